"""AdamW, with the parameters grouped by what their classes declare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from selective_ssm.config import Config
from selective_ssm.errors import UserError
from selective_ssm.layers.mixer import Mixer
from selective_ssm.layers.ssm import InnerSSM


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """AdamW, as the GPT-3 recipe sets it.

    Args:
        lr: peak learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: for matrices; biases, norms and what a class declares are spared.
        clip: largest norm of the whole gradient; None leaves it as it is.
        fused: torch's fused kernel, several times faster on the CPU too.
    """

    kind: ClassVar[str] = "adamw"

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0
    fused: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise UserError(f"lr must be above 0 and finite, got {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas must be at least 0 and below 1, got {self.betas}")
        for name in ("eps", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be 0 or more and finite, got {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"clip must be above 0, or null for no clipping, got {self.clip}")


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Split a model's parameters by weight decay and learning rate.

    Vectors and scalars (biases, norms, D) are not decayed, nor is what a mixer or an inner SSM lists in its
    ``no_weight_decay``; its ``learning_rates`` multiply the rate of the parameters that it names.

    Args:
        model: the model; each shared parameter is listed once.
        config: the optimizer's settings.

    Returns:
        Groups for `torch.optim.AdamW`; ``peak_lr`` keeps the rate that a schedule scales.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, decayed, multiplier in _declared(model):
        key = (config.weight_decay if decayed else 0.0, config.lr * multiplier)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay, "lr": lr, "peak_lr": lr}
        for (weight_decay, lr), parameters in groups.items()
    ]


def adamw(model: nn.Module, config: OptimizerConfig, *, fused: bool, capturable: bool = False) -> torch.optim.AdamW:
    """AdamW over the groups of `parameter_groups`; `capturable` is whether a CUDA graph may hold its steps."""
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused, capturable=capturable
    )


def _declared(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool, float]]:
    """Each trained parameter once, whether it decays, and its multiple of the learning rate."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        contract = type(module) if isinstance(module, (Mixer, InnerSSM)) else None
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            spared = parameter.ndim < 2 or (contract is not None and name in contract.no_weight_decay)
            multiplier = contract.learning_rates.get(name, 1.0) if contract is not None else 1.0
            yield parameter, not spared, multiplier
