"""The contract every mixer keeps: one residual branch of a model, over a whole sequence or token by token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from selective_ssm.config import Config

State = tuple[Tensor, ...]
"""What a mixer remembers: a flat tuple of tensors, the batch (slot) axis first in each; empty for a stateless mixer."""


@dataclass(frozen=True, kw_only=True)
class MixerConfig(Config):
    """Base of the configs of all mixers."""


class Mixer(nn.Module, ABC):
    """One residual branch: maps a sequence (B, L, d_model) to another of the same shape.

    A subclass is final, is built as ``Mixer(config, d_model)``, and calls its linears as modules, never by ``.weight``,
    so that an adapter can take their place. It names the one that writes to the residual stream ``out_proj``: the
    backbone scales that one by depth.
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset()
    """Names of the class's own parameters that weight decay skips. Declared here because attributes hung on a
    parameter are lost by ``deepcopy`` and ``to_empty``."""

    learning_rates: ClassVar[Mapping[str, float]] = {}
    """Multipliers of the learning rate, by name of the class's own parameters."""

    out_proj: nn.Linear

    @abstractmethod
    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        """Mix whole sequences, in parallel over the length; also prefill and the resumption of a chunk.

        Args:
            x: (B, L, d_model), B = 1 where sequences are packed.
            state: what came before, one row a sequence; None is the state before the first token. It is not changed.
            cu_seqlens: (S + 1,) boundaries of packed sequences, from 0 to L.
            return_state: whether the state after the last token is wanted.

        Returns:
            y (B, L, d_model), and the state (one row a sequence) or None.
        """

    @abstractmethod
    def step(self, x: Tensor, state: State, *, state_indices: Tensor | None = None) -> tuple[Tensor, State]:
        """Mix one token a row.

        Args:
            x: (B, d_model).
            state: what came before. It is consumed: its memory is reused, so go on with the returned one only.
            state_indices: (B,) the slot of the state that each row uses; negative is padding. By default, row b uses
                slot b.

        Returns:
            y (B, d_model), and the state after the token.
        """

    @abstractmethod
    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        """The state before the first token.

        Args:
            batch: number of slots.
            device: where it lives.
            dtype: that of the activations; what accumulates over the length is kept in fp32 at least.
            max_length: room to make, for kinds whose state grows; the others ignore it.
        """

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw every parameter anew: the only initialiser, so that a model built on the meta device can use it."""


def reset_linear(linear: nn.Linear) -> None:
    """Initialise as the released Mamba does: weight uniform within 1/sqrt(inputs), bias zero."""
    linear.reset_parameters()
    if linear.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
        nn.init.zeros_(linear.bias)


def in_float32(tensor: Tensor) -> Tensor:
    """The tensor in fp32 at least: what the scan keeps its parameters and its state in; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Where matrix products stay in the precision of what they are given; a device that knows no autocast does so."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
