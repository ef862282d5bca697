"""One run from a config to a trained model, begun or continued."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from selective_ssm.config import from_tagged, to_tagged
from selective_ssm.data import TextBatches, Tokenizer, held_out_documents, load_tokenizer, tokenizer_from
from selective_ssm.errors import FileProblem, UserError, choice, require
from selective_ssm.files import read_json
from selective_ssm.models import LanguageModel
from selective_ssm.training.callbacks import StepEnd
from selective_ssm.training.checkpoint import ADAPTER_FOLDER, CONFIG_FILE, RESUME_FILE, ResumeFile, RunFolder
from selective_ssm.training.config import KINDS, TrainConfig, TrainerConfig
from selective_ssm.training.data import ResumableBatches
from selective_ssm.training.lora import Adapters
from selective_ssm.training.metrics import CSVMetrics
from selective_ssm.training.module import LanguageTraining
from selective_ssm.training.progress import Progress
from selective_ssm.training.rng import seed_all
from selective_ssm.training.signals import StopSignals

_PRECISIONS: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """What a run came to.

    Args:
        checkpoint: the last checkpoint's folder, ready for `LanguageModel.from_pretrained`.
        steps: optimizer steps, those before a resume included.
        resumed_at: the step from which this call went on; 0 where it began anew, ``steps`` where nothing was left.
        tokens: tokens trained on.
        seconds: time of training.
        loss: the last step's, in nats a token.
        held_out_bits_per_byte: the latest measurement, None without held-out documents.
    """

    checkpoint: Path
    steps: int
    resumed_at: int
    tokens: int
    seconds: float
    loss: float
    held_out_bits_per_byte: float | None


def train(
    config: TrainConfig, *, resume: Literal["auto", "never"] = "auto", adapters: Adapters | None = None
) -> TrainSummary:
    """Train a language model; called again after an interruption, go on where the last checkpoint stands.

    A run that is bound by steps goes on exactly: on the CPU its losses are, bit for bit, those of a run that was never
    interrupted. Python's, numpy's and torch's random number generators are seeded. SIGTERM and Ctrl-C end the step
    that is under way, save, and then end the process as they usually do.

    Args:
        config: the whole run. When it is resumed, model, base, adapters, data, optimizer, ``precision``, ``accumulate``
            and ``ema_decay`` must be what they were; how long, how often, on what device and how the learning rate
            moves may change.
        resume: "auto" goes on if the output folder holds a run, "never" refuses such a folder.
        adapters: what makes those that ``config.lora`` asks for: `selective_ssm.interop.peft`.

    Returns:
        A summary; the run's folder holds the checkpoints and the metrics.

    Raises:
        UserError: the settings cannot be used, the data or the folder cannot be read or written, another process
            trains in the folder, or the loss became NaN; the last good checkpoint stays as it was.
        SystemExit: with code 143, after SIGTERM.
        KeyboardInterrupt: after Ctrl-C.
    """
    choice("resume", resume, ("auto", "never"))
    _check_device(config.trainer)
    if config.lora.r and adapters is None:
        raise UserError("the config asks for adapters: give train what makes them, adapters=selective_ssm.interop.peft")
    folder = RunFolder(config.trainer.output)
    with folder.alone():
        return _train(config, folder, resume, adapters if config.lora.r else None)


def _train(
    config: TrainConfig, folder: RunFolder, resume: Literal["auto", "never"], adapters: Adapters | None
) -> TrainSummary:
    """Train in a folder that no other process trains in."""
    if folder.resumable:
        _check_resumption(config, folder, resume)
    step = folder.step
    seed_all(config.trainer.seed)
    tokenizer = tokenizer_from(config.data.tokenizer)
    model = _model(config, folder, adapters)
    _check_tokenizer(tokenizer, model, config)
    batches = TextBatches(config.data)
    timer = Timer()
    module = LanguageTraining(model, config, timer)
    signals = StopSignals()
    step_end = StepEnd(
        folder=folder,
        tokenizer=tokenizer,
        held_out=held_out_documents(config.data),
        bytes_per_token=batches.bytes_per_token,
        signals=signals,
        progress=Progress(config.trainer.max_steps),
        adapters=adapters,
    )
    loggers = _loggers(config.trainer, folder, step)
    with signals, _quiet_lightning():
        trainer = _trainer(config.trainer, callbacks=[timer, step_end], loggers=loggers)
        try:
            trainer.fit(
                module,
                datamodule=ResumableBatches(batches, workers=config.trainer.workers),
                ckpt_path=folder.last.resolve() / RESUME_FILE if folder.resumable else None,
            )
        except SystemExit:
            if signals.received is None:  # or else it is how Lightning leaves after a signal: we leave as that asks
                raise
    signals.leave()
    return TrainSummary(
        checkpoint=folder.last,
        steps=trainer.global_step,
        resumed_at=step,
        tokens=module.tokens,
        seconds=module.seconds,
        loss=module.figures["loss"],
        held_out_bits_per_byte=module.figures.get("held_out_bits_per_byte"),
    )


def _model(config: TrainConfig, folder: RunFolder, adapters: Adapters | None) -> LanguageModel:
    """The model of the last checkpoint, else that of the base, else a new one; adapters stand beside the base."""
    if adapters is None and folder.resumable:
        return LanguageModel.from_pretrained(folder.last)
    if config.base is None:
        assert config.model is not None
        return LanguageModel(config.model)
    model = LanguageModel.from_pretrained(config.base, dtype=torch.float32)
    if adapters is not None and folder.resumable:
        adapters.load_adapters(model, folder.last / ADAPTER_FOLDER, trainable=True)
    elif adapters is not None:
        adapters.add_lora(model, r=config.lora.r, alpha=config.lora.alpha, targets=config.lora.targets)
    return model


def _check_tokenizer(tokenizer: Tokenizer, model: LanguageModel, config: TrainConfig) -> None:
    """Refuse ids that the model does not know, or knows as other text."""
    named = config.data.tokenizer
    known = model.config.vocab_size
    if known < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size must be at least {tokenizer.vocab_size}, as many tokens as the tokenizer "
            f"'{named}' has, got {known}"
        )
    learned = None if config.base is None else load_tokenizer(config.base)
    if learned is not None and learned.identity != tokenizer.identity:
        raise UserError(f"the tokenizer '{named}' is not the base's own: name that one, --data.tokenizer {config.base}")


def _check_resumption(config: TrainConfig, folder: RunFolder, resume: str) -> None:
    """Refuse to go on where that is not wanted, or with settings that a run cannot change; data check themselves."""
    if resume == "never":
        raise UserError(f"'{folder.path}' holds a run already: choose another output folder, or resume that one")
    before, now = _fixed(_begun_with(folder.last / CONFIG_FILE)), _fixed(config)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        told = "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in changed)
        raise UserError(f"this run began with other settings ({told}): use those, or choose another output folder")


def _begun_with(path: Path) -> TrainConfig:
    """The config that a checkpoint holds."""
    data = read_json(path)
    try:
        config = from_tagged(data, KINDS)
    except UserError as error:
        raise FileProblem(f"'{path}' is not the config of a run: {error}") from error
    if not isinstance(config, TrainConfig):
        raise FileProblem(f"'{path}' is not the config of a run: its kind is '{config.kind}'")
    return config


def _fixed(config: TrainConfig) -> dict[str, Any]:
    """The settings that stay the same over a whole run, by their dotted names."""
    parts = {name: to_tagged(one) for name in ("model", "lora", "optimizer") if (one := getattr(config, name))}
    parts["trainer"] = {name: getattr(config.trainer, name) for name in ("accumulate", "ema_decay", "precision")}
    fixed = {f"{part}.{key}": value for part, settings in parts.items() for key, value in settings.items()}
    return {"base": config.base, **fixed}


def _check_device(config: TrainerConfig) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for, but torch finds no GPU here: use device 'auto' or 'cpu'")
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' was asked for, but torch finds no Apple GPU here: use device 'auto' or 'cpu'")
    if config.precision == "fp16" and (config.device in ("cpu", "mps") or not torch.cuda.is_available()):
        raise UserError("precision 'fp16' needs a GPU (its scaled loss is of no use elsewhere): use 'bf16' or 'fp32'")


def _loggers(config: TrainerConfig, folder: RunFolder, step: int) -> list[Logger]:
    loggers: list[Logger] = [CSVMetrics(folder.metrics, step=step)]
    if config.tensorboard:
        require("tensorboard", "tensorboard")
        loggers.append(TensorBoardLogger(folder.path, name=None, version="tensorboard", purge_step=step + 1))
    return loggers


def _trainer(config: TrainerConfig, *, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
    return Trainer(
        accelerator=config.device,
        devices=1,
        precision=_PRECISIONS[config.precision],
        max_steps=config.max_steps or -1,
        max_epochs=-1,
        accumulate_grad_batches=config.accumulate,
        callbacks=callbacks,
        logger=loggers,
        plugins=[ResumeFile()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=config.output,
    )


@contextmanager
def _quiet_lightning() -> Generator[None]:
    """Keep Lightning to what concerns the run: not what it says of itself, nor advice, nor its own outdated calls."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for advice in ("does not have many workers", "available but not used", "LeafSpec.* is deprecated"):
                warnings.filterwarnings("ignore", message=f".*{advice}")
            yield
    finally:
        logger.setLevel(level)
