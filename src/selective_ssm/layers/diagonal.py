"""What SSMs with a diagonal A share: real or complex state, the range of Δ, A itself, sums of its powers.

Legend: B batch, L length, D channels, N state, M blocks of T steps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.errors import UserError, choice
from selective_ssm.layers.checks import require_positive
from selective_ssm.layers.mixer import State, in_float32, without_autocast
from selective_ssm.layers.ssm import SSMConfig


@dataclass(frozen=True, kw_only=True)
class DiagonalConfig(SSMConfig):
    """Base of the configs of diagonal SSMs.

    Args:
        d_state: real numbers of state a channel; a complex state counts two.
        discretization: "euler" (B̄ = ΔB) or "zoh" (exact).
        skip: whether D·x is added to the output.
        dt_min: smallest Δ drawn at the start.
        dt_max: largest Δ drawn at the start.
    """

    d_state: int
    discretization: Literal["euler", "zoh"]
    skip: bool = True
    dt_min: float = 1e-3
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        choice("discretization", self.discretization, ("euler", "zoh"))
        require_positive(self, "d_state", "dt_min", "dt_max")
        if self.is_complex and self.d_state % 2:
            raise UserError(f"{self.kind}: d_state must be even where the state is complex, got {self.d_state}")
        if self.dt_min > self.dt_max:
            raise UserError(f"{self.kind}: dt_min must not exceed dt_max, got {self.dt_min} and {self.dt_max}")

    @property
    @abstractmethod
    def is_complex(self) -> bool:
        """Whether the state is complex."""

    @property
    def states(self) -> int:
        """N, the size of a channel's state in its own numbers: d_state real ones or d_state / 2 complex ones."""
        return self.d_state // 2 if self.is_complex else self.d_state

    def zero_state(self, batch: int, width: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first token, (B, D, N) in fp32 or complex64 at least."""
        dtype = torch.promote_types(dtype, torch.complex64 if self.is_complex else torch.float32)
        return (torch.zeros(batch, width, self.states, device=device, dtype=dtype),)


def diagonal(A_log: Tensor, A_imag: Tensor | None) -> Tensor:
    """A (D, N) = -exp(A_log) + i A_imag: its real part stays negative whatever training does, so that h decays."""
    real = -torch.exp(in_float32(A_log))
    return real if A_imag is None else torch.complex(real, in_float32(A_imag))


def pairs_as_complex(pairs: Tensor) -> Tensor:
    """Real numbers (…, 2 N), neighbours being real and imaginary part, as complex ones (…, N)."""
    wide = in_float32(pairs)
    return torch.complex(wide[..., ::2], wide[..., 1::2])


def as_pairs(x: Tensor) -> Tensor:
    """Complex numbers (…, N) as real ones (…, 2 N), the inverse of `pairs_as_complex`; real ones as they are."""
    return torch.view_as_real(x).flatten(-2) if x.is_complex() else x


def sums_of_powers(weights: Tensor, rates: Tensor, length: int) -> Tensor:
    """sum_n w_n exp(l r_n) for every l < length; 2 Re of it where the rates are complex.

    With l = i T + j and T about sqrt(length), exp(l r) = exp(i T r) exp(j r), so that the sums are one batched matrix
    product and nothing of shape (D, N, length) is ever made.

    Args:
        weights: (…, D, N), in the dtype of the rates.
        rates: (D, N).
        length: how many sums.

    Returns:
        (…, D, length), real.
    """
    starts, inside = _powers(rates, length)
    from_start = as_pairs((weights[..., None, :] * starts).conj_physical())
    with without_autocast(rates.device):
        sums = torch.einsum("...dmn,dtn->...dmt", from_start, as_pairs(inside)).flatten(-2)[..., :length]
    return 2 * sums if rates.is_complex() else sums


def weighted_by_powers(x: Tensor, rates: Tensor) -> Tensor:
    """sum_l exp(l r_n) x_l, cut into blocks as `sums_of_powers`, of which it is the transpose.

    Args:
        x: (B, L, D) fp32 or float64.
        rates: (D, N) of that precision, real or complex.

    Returns:
        (B, D, N) in the dtype of the rates.
    """
    starts, inside = _powers(rates, x.shape[1])
    blocks, size = starts.shape[1], inside.shape[1]
    x = F.pad(x, (0, 0, 0, blocks * size - x.shape[1])).unflatten(1, (blocks, size))
    with without_autocast(rates.device):
        sums = torch.einsum("bmtd,dtn->bdmn", x, as_pairs(inside))
    return ((pairs_as_complex(sums) if rates.is_complex() else sums) * starts).sum(2)


def _powers(rates: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """exp(i T r) (D, M, N) of each block's first step and exp(j r) (D, T, N) of the steps within, M T >= length."""
    block = math.isqrt(max(length - 1, 0)) + 1
    starts = torch.arange(0, length, block, device=rates.device, dtype=rates.real.dtype)
    within = torch.arange(block, device=rates.device, dtype=rates.real.dtype)
    return torch.exp(rates[:, None] * starts[:, None]), torch.exp(rates[:, None] * within[:, None])


def zero_delta(x: Tensor) -> Tensor:
    """A zero for every Δ of x without the memory, where all of Δ is its bias."""
    return x.new_zeros(x.shape[-1]).expand_as(x)
