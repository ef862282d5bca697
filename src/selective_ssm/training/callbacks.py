"""What is done between two steps: evaluate, write down, save, show, stop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from selective_ssm.config import to_tagged
from selective_ssm.data import Document, Tokenizer
from selective_ssm.evaluation import evaluate
from selective_ssm.files import write_json
from selective_ssm.models.card import Card
from selective_ssm.tasks import bits_per_byte
from selective_ssm.training.checkpoint import ADAPTER_FOLDER, CONFIG_FILE, RESUME_FILE, RunFolder
from selective_ssm.training.lora import Adapters
from selective_ssm.training.module import LanguageTraining, diverged
from selective_ssm.training.progress import Progress
from selective_ssm.training.signals import StopSignals


class StepEnd(Callback):
    """The housekeeping after each optimizer step.

    Args:
        folder: where the checkpoints go.
        tokenizer: saved with each of them.
        held_out: documents to evaluate on; none for no evaluation.
        bytes_per_token: of the training text, to tell its loss in bits a byte.
        signals: tells when the process was asked to stop.
        progress: shows how the run is going.
        adapters: saves the model where it has adapters; None where it has none.
    """

    def __init__(
        self,
        *,
        folder: RunFolder,
        tokenizer: Tokenizer,
        held_out: Sequence[Document],
        bytes_per_token: float,
        signals: StopSignals,
        progress: Progress,
        adapters: Adapters | None,
    ) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._held_out = held_out
        self._bytes_per_token = bytes_per_token
        self._signals = signals
        self._progress = progress
        self._adapters = adapters
        self._tokens_before = 0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _ours(pl_module)
        self._tokens_before, self._since = module.tokens, time.monotonic()
        trainer.should_stop = trainer.global_step > 0 and module.progress >= 1
        self._progress.start(module.progress)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        module, step, reached = _ours(pl_module), trainer.global_step, time.monotonic()
        settings = module.config.trainer
        ended = module.progress >= 1
        last = ended or self._signals.received is not None
        evaluated = bool(self._held_out) and (ended or step % settings.eval_every == 0)
        improved = evaluated and self._evaluate(trainer, module)
        logged = last or evaluated or step % settings.log_every == 0
        if logged:
            self._log(trainer, module, reached)
        if last or improved or step % settings.save_every == 0:
            self._save(trainer, module, best=improved)
        if logged:
            self._progress.show(step, module.progress, module.figures)
        trainer.should_stop = last

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if checkpoint["run"]["best_step"] == checkpoint["global_step"]:
            self._folder.point_best_at_last()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._progress.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._progress.stop()

    def _evaluate(self, trainer: Trainer, module: LanguageTraining) -> bool:
        """Measure the held-out documents; whether the model never did better."""
        with trainer.precision_plugin.forward_context():
            measured = evaluate(module.kept_model, self._held_out, self._tokenizer).bits_per_byte
        module.figures["held_out_bits_per_byte"] = measured
        improved = measured < module.best
        if improved:
            module.best, module.best_step = measured, trainer.global_step
        return improved

    def _log(self, trainer: Trainer, module: LanguageTraining, reached: float) -> None:
        """Write a row; the speed is that of the steps since the last one, up to the instant the step was reached."""
        module.figures |= {
            "tokens": module.tokens,
            "seconds": module.seconds,
            "bits_per_byte": bits_per_byte(module.figures["loss"], 1) / self._bytes_per_token,
            "tokens_per_second": (module.tokens - self._tokens_before) / max(reached - self._since, 1e-9),
        }
        self._tokens_before, self._since = module.tokens, time.monotonic()
        for logger in trainer.loggers:
            logger.log_metrics(module.figures, trainer.global_step)

    def _save(self, trainer: Trainer, module: LanguageTraining, *, best: bool) -> None:
        if not all(torch.isfinite(parameter).all() for parameter in module.kept_model.parameters()):
            raise diverged("a weight became infinite or NaN", step=trainer.global_step)
        with self._folder.checkpoint(trainer.global_step, best=best) as checkpoint:
            model = module.kept_model
            if self._adapters is not None:
                self._adapters.save_adapters(model, checkpoint / ADAPTER_FOLDER)
                model = self._adapters.merged(model)
            model.save_pretrained(checkpoint, card=_card(module, trainer.global_step))
            self._tokenizer.save(checkpoint)
            write_json(checkpoint / CONFIG_FILE, to_tagged(module.config))
            trainer.save_checkpoint(checkpoint / RESUME_FILE)


def _card(module: LanguageTraining, step: int) -> Card:
    held_out = module.figures.get("held_out_bits_per_byte")
    measured = {} if held_out is None else {"bits per byte of held-out documents, as last measured": held_out}
    progress = {"steps": step, "tokens": module.tokens}
    return Card(data=f"`{module.config.data.source}`", metrics={**progress, **measured})


def _ours(module: LightningModule) -> LanguageTraining:
    assert isinstance(module, LanguageTraining)
    return module
