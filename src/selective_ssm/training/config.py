"""A whole experiment as one config: what to train, on what, how and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from selective_ssm.config import Config
from selective_ssm.data.config import DataConfig
from selective_ssm.errors import UserError, choice
from selective_ssm.layers.recompute import Recompute
from selective_ssm.models import CONFIG_KINDS, LanguageModelConfig
from selective_ssm.training.lora import LoraConfig
from selective_ssm.training.optimizer import OptimizerConfig
from selective_ssm.training.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Config):
    """How long to train, with what, and what to write down.

    Args:
        output: the run's folder, which holds its checkpoints and metrics.
        max_steps: optimizer steps to take; such a run can be interrupted and resumed bit for bit.
        max_minutes: time to train; there is one step at least. The schedule follows whichever of the two limits is
            nearer; one of them is needed.
        accumulate: batches whose gradients make one step.
        precision: of the activations; parameters, moments and the scan's state stay in fp32. fp16 needs a GPU.
        activation_checkpointing: what of each layer is computed again in the backward pass to save memory: "none",
            "selective" (all but the scans) or "full". The gradients are the same.
        device: where to train; "auto" takes an accelerator that is there.
        seed: of the initialisation (the data have their own).
        ema_decay: keep an exponential moving average of the weights, which is then what is evaluated and saved.
        eval_every: steps between evaluations on the held-out documents.
        save_every: steps between checkpoints. There is one at the end, too, and one when the run is told to stop.
        log_every: steps between rows of the metrics.
        workers: processes that prepare batches ahead; 0 prepares them in the training process.
        tensorboard: write TensorBoard's logs, too.
    """

    kind: ClassVar[str] = "trainer"

    output: str
    max_steps: int | None = None
    max_minutes: float | None = None
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: Recompute = "none"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    seed: int = 0
    ema_decay: float | None = None
    eval_every: int = 500
    save_every: int = 500
    log_every: int = 1
    workers: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        choice("precision", self.precision, ("fp32", "bf16", "fp16"))
        choice("activation_checkpointing", self.activation_checkpointing, ("none", "selective", "full"))
        choice("device", self.device, ("auto", "cpu", "cuda", "mps"))
        if self.max_steps is None and self.max_minutes is None:
            raise UserError("how long to train is not said: set max_steps, max_minutes or both")
        for name in ("max_steps", "max_minutes", "accumulate", "eval_every", "save_every", "log_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} must be above 0, got {value}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be at least 0 and below 2**32, got {self.seed}")
        if self.workers < 0:
            raise UserError(f"workers must be 0 or more, got {self.workers}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay must be between 0 and 1, or null for no average, got {self.ema_decay}")

    def progress(self, *, step: int, seconds: float) -> float:
        """The share of the run that is behind after some steps and some seconds of training; 1 ends it."""
        by_steps = step / self.max_steps if self.max_steps else 0.0
        by_time = seconds / (60 * self.max_minutes) if self.max_minutes else 0.0
        return min(1.0, max(by_steps, by_time))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """One training run, whole: what a recipe fills.

    Args:
        model: the model to train from scratch; not where there is a base.
        base: folder of a checkpoint, whose model is trained on.
        lora: adapters to train in place of the base's weights.
        data: what to train on; the tokenizer must be the base's.
        trainer: how long, with what, and what to write down.
        optimizer: how weights are changed.
        schedule: how the learning rate moves.

    Example:
        >>> config = TrainConfig(
        ...     model=LanguageModelConfig(d_model=64, n_layer=2, vocab_size=257),
        ...     data=DataConfig(source="python_stdlib"),
        ...     trainer=TrainerConfig(output="runs/example", max_steps=100),
        ... )
        >>> config.optimizer.betas
        (0.9, 0.95)
    """

    kind: ClassVar[str] = "train"

    model: LanguageModelConfig | None = None
    base: str | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig
    trainer: TrainerConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        if (self.model is None) == (self.base is None):
            raise UserError("give either model, what to train from scratch, or base, a checkpoint to start from")
        if self.lora.r and self.base is None:
            raise UserError("lora trains adapters beside weights that stay as they are: name their checkpoint as base")


KINDS: Mapping[str, type[Config]] = {
    **CONFIG_KINDS,
    **{one.kind: one for one in (TrainConfig, DataConfig, TrainerConfig, OptimizerConfig, ScheduleConfig, LoraConfig)},
}
"""Every config that a tagged `TrainConfig` may hold."""
