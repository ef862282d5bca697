"""What every backend of the causal convolution is handed, already checked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The tensors of a convolution, in the operator's order; the first four are differentiable."""

    x: Tensor  # (B, L, D)
    weight: Tensor  # (D, K)
    bias: Tensor | None  # (D,)
    initial_state: Tensor | None  # (B, D, K - 1), packed (S, D, K - 1)
    cu_seqlens: Tensor | None  # (S + 1,)


class StepInputs(NamedTuple):
    """The tensors of one step, in the operator's order."""

    x: Tensor  # (B, D)
    weight: Tensor  # (D, K)
    bias: Tensor | None  # (D,)


class Options(NamedTuple):
    """How a convolution is computed."""

    activation: str | None  # "silu" or None
    reverse: bool
