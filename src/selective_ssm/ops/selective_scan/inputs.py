"""What every backend of the selective scan is handed, already checked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The tensors of a scan, in the operator's order; the first nine are differentiable."""

    u: Tensor  # (B, L, D)
    delta: Tensor  # (B, L, D)
    A: Tensor  # (D, N)
    B: Tensor  # (B, L, G, N), (B, L, N) for one group, or (D, N)
    C: Tensor  # as B
    D: Tensor | None  # (D,)
    z: Tensor | None  # (B, L, D)
    delta_bias: Tensor | None  # (D,)
    initial_state: Tensor | None  # (B, D, N), packed (S, D, N)
    cu_seqlens: Tensor | None  # (S + 1,)


class StepInputs(NamedTuple):
    """The tensors of one step, in the operator's order."""

    u: Tensor  # (B, D)
    delta: Tensor  # (B, D)
    A: Tensor  # (D, N)
    B: Tensor  # (B, G, N), (B, N) for one group, or (D, N); where B = D a matrix is (B, N)
    C: Tensor  # as B
    D: Tensor | None  # (D,)
    z: Tensor | None  # (B, D)
    delta_bias: Tensor | None  # (D,)


class Options(NamedTuple):
    """How a scan is computed."""

    delta_softplus: bool
    reverse: bool
    discretization: str  # "euler" or "zoh"
