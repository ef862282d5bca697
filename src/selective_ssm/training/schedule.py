"""How the learning rate moves over a run: a pure function, so that a resumed run has nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from selective_ssm.config import Config
from selective_ssm.errors import UserError, choice


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Config):
    """Linear warm-up, then a shape over the whole run.

    Args:
        shape: "cosine" falls from the start; "constant" stays; "wsd" (warm-up, stable, decay) stays and falls linearly
            over the last ``decay_fraction`` of the run.
        warmup_steps: steps over which the rate rises from zero.
        min_lr_ratio: what the rate falls to, as a share of its peak.
        decay_fraction: last share of a "wsd" run, in which the rate falls.
    """

    kind: ClassVar[str] = "schedule"

    shape: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        choice("shape", self.shape, ("cosine", "constant", "wsd"))
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps must be 0 or more, got {self.warmup_steps}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"min_lr_ratio must be between 0 and 1, got {self.min_lr_ratio}")
        if not 0 < self.decay_fraction <= 1:
            raise UserError(f"decay_fraction must be above 0 and at most 1, got {self.decay_fraction}")


def learning_rate_factor(config: ScheduleConfig, *, step: int, progress: float) -> float:
    """The share of its peak that the learning rate has at one step.

    Args:
        config: the schedule.
        step: optimizer steps taken before this one.
        progress: share of the run that is behind, 0 … 1, by steps or by time.

    Returns:
        A number between 0 and 1.

    Example:
        >>> cosine = ScheduleConfig(warmup_steps=10, min_lr_ratio=0.0)
        >>> [round(learning_rate_factor(cosine, step=step, progress=step / 100), 2) for step in (0, 9, 50, 100)]
        [0.1, 0.98, 0.5, 0.0]
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return warmup * (config.min_lr_ratio + (1 - config.min_lr_ratio) * _decay(config, min(progress, 1.0)))


def _decay(config: ScheduleConfig, progress: float) -> float:
    """The shape alone: 1 at the peak, 0 at the end of a run that decays."""
    if config.shape == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if config.shape == "wsd":
        return min(1.0, (1 - progress) / config.decay_fraction)
    return 1.0
