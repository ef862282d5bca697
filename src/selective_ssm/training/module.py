"""What happens in one step of training a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from selective_ssm.data import Batch
from selective_ssm.errors import UserError
from selective_ssm.models import LanguageModel
from selective_ssm.models.fingerprint import fingerprint
from selective_ssm.tasks import next_token_loss
from selective_ssm.training.config import TrainConfig
from selective_ssm.training.optimizer import adamw
from selective_ssm.training.rng import rng_state, set_rng_state
from selective_ssm.training.schedule import learning_rate_factor

_KEPT = ("tokens", "figures", "best", "best_step")


class LanguageTraining(LightningModule):
    """Next-token loss, AdamW under a schedule, and on request an average of the weights.

    The weights themselves are no part of the trainer's state: they lie beside it as the checkpoint's model, from which
    a resumed run builds the model that it hands in here. With an average, that one is the checkpoint's model, and both
    sets of weights are kept in the state. Weights that are not trained must be what they were.

    Args:
        model: the model to train, in fp32.
        config: the run.
        timer: counts the seconds of training, those before a resume included.
    """

    def __init__(self, model: LanguageModel, config: TrainConfig, timer: Timer) -> None:
        super().__init__()
        self.model = model
        self.model.backbone.recompute = config.trainer.activation_checkpointing
        self.config = config
        self.timer = timer
        self.tokens = 0
        self.figures: dict[str, float] = {}
        """What is known of the step that ended last."""
        self.best = float("inf")
        """The lowest bits per byte so far on the held-out documents."""
        self.best_step: int | None = None
        """The step at which they were measured."""
        self.average: AveragedModel | None = None
        if config.trainer.ema_decay is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.trainer.ema_decay))
            self.average.requires_grad_(False)
        self.strict_loading = self.average is not None
        frozen = {name: one for name, one in model.named_parameters() if not one.requires_grad}
        self._frozen = fingerprint(frozen)
        self._losses: list[Tensor] = []
        self._rng: dict[str, Any] | None = None

    @property
    def kept_model(self) -> LanguageModel:
        """The model that is evaluated and saved: the average of the weights where there is one."""
        return self.model if self.average is None else cast(LanguageModel, self.average.module)

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.timer.time_elapsed()

    @property
    def progress(self) -> float:
        """The share of the run that is behind."""
        return self.config.trainer.progress(step=self.trainer.global_step, seconds=self.seconds)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # The loss scaling of fp16 needs gradients unscaled before they are clipped; the fused kernel unscales too late.
        fused = self.config.optimizer.fused and self.config.trainer.precision != "fp16"
        return adamw(self.model, self.config.optimizer, fused=fused)

    def on_train_start(self) -> None:
        if self._rng is not None:  # not earlier: what sets up the loop may have drawn numbers
            set_rng_state(self._rng)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = next_token_loss(self.model(batch.ids, cu_seqlens=batch.cu_seqlens).logits, batch.targets)
        self._losses.append(loss.detach())
        self.tokens += batch.targets.numel()
        return loss

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: object, **__: object) -> None:
        """Clip by our own settings: Lightning's refuses the fused kernel in mixed precision."""
        clip = self.config.optimizer.clip
        norm = float(clip_grad_norm_(self.model.parameters(), float("inf") if clip is None else clip))
        loss = float(torch.stack(self._losses).mean())
        self._losses.clear()
        self.figures = {"loss": loss, "gradient_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}
        scaled = self.config.trainer.precision == "fp16"  # there, steps with an overflow are left out by the scaler
        for name, value in (("loss", loss),) if scaled else (("loss", loss), ("norm of the gradient", norm)):
            if not abs(value) < float("inf"):
                raise diverged(f"the {name} became {value}", step=self.trainer.global_step + 1)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        factor = learning_rate_factor(self.config.schedule, step=self.trainer.global_step, progress=self.progress)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.average is not None:
            self.average.update_parameters(self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.average is None:
            checkpoint["state_dict"] = {}
        checkpoint["run"] = {name: getattr(self, name) for name in _KEPT}
        checkpoint["rng"] = rng_state()
        checkpoint["frozen"] = self._frozen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["frozen"] != self._frozen:
            raise UserError(
                "the base that this run trains adapters for is not what it was, so the run cannot go on: restore the "
                "checkpoint that it began from, or choose another output folder"
            )
        for name in _KEPT:
            setattr(self, name, checkpoint["run"][name])
        self._rng = checkpoint["rng"]


def diverged(what: str, *, step: int) -> UserError:
    """The error of a run whose numbers ran away."""
    return UserError(
        f"{what} at step {step}, so training stopped; the last checkpoint is as it was: begin another run with a lower "
        "learning rate, a longer warm-up or a tighter clip"
    )
