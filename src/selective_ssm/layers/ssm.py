"""The contract of an inner SSM: what stands inside a block, between its projections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from selective_ssm.config import Config
from selective_ssm.layers.mixer import State


@dataclass(frozen=True, kw_only=True)
class SSMConfig(Config):
    """Base of the configs of all inner SSMs."""


class InnerSSM(nn.Module, ABC):
    """A state space model over the channels of a block: (B, L, width) to (B, L, width).

    It keeps the contract of `Mixer` and takes one argument more: z, the gate, by whose SiLU the output is multiplied.
    A subclass is final and is built as ``InnerSSM(config, width, d_model)``: the channels it acts on, and the width of
    the model around the block, by which some defaults are measured.
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset()
    learning_rates: ClassVar[Mapping[str, float]] = {}

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        """Act on whole sequences: x, z and the result (B, L, width); the rest as in `Mixer.forward`."""

    @abstractmethod
    def step(
        self, x: Tensor, z: Tensor | None, state: State, *, state_indices: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Act on one token a row: x, z and the result (B, width); the rest as in `Mixer.step`."""

    @abstractmethod
    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        """The state before the first token, as in `Mixer.init_state`."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw every parameter anew, as in `Mixer.reset_parameters`."""
