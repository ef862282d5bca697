"""Training adapters beside weights that stay: their settings, and what makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from selective_ssm.config import Config
from selective_ssm.errors import UserError
from selective_ssm.models import LanguageModel


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Config):
    """Low-rank adapters: where a linear layer computes W x, W stays and W x + alpha / r · B A x is trained in A and B.

    Args:
        r: rank of the adapters, the rows of A and the columns of B; 0 is none, and all weights are trained.
        alpha: how strongly they act.
        targets: names of the linear layers that get them; by default all: in_proj, x_proj, dt_proj, out_proj.
    """

    kind: ClassVar[str] = "lora"

    r: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.r < 0:
            raise UserError(f"r must be 1 or more, or 0 for no adapters, got {self.r}")
        if not self.r and (self.alpha, self.targets) != (LoraConfig.alpha, LoraConfig.targets):
            raise UserError("alpha and targets are of adapters, and without r there are none: give their rank r too")


class Adapters(Protocol):
    """What a module must offer to put adapters into models that train; `selective_ssm.interop.peft` is one."""

    def add_lora(self, model: LanguageModel, *, r: int, alpha: float, targets: Sequence[str] | None) -> None:
        """Let the model's weights stay as they are, and put adapters that are trained beside them, in place."""
        ...

    def save_adapters(self, model: LanguageModel, folder: str | Path) -> None:
        """Write the adapters alone."""
        ...

    def load_adapters(self, model: LanguageModel, folder: str | Path, *, trainable: bool) -> None:
        """As `add_lora`, with the adapters that `save_adapters` wrote."""
        ...

    def merged(self, model: LanguageModel) -> LanguageModel:
        """An ordinary model that computes the same, the adapters added into its weights."""
        ...
