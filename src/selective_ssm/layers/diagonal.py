"""What SSMs with a diagonal A share: real or complex state, the range of Δ, A itself.

Legend: D channels, N state.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from selective_ssm.errors import UserError, choice
from selective_ssm.layers.checks import require_positive
from selective_ssm.layers.mixer import State, in_float32
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


def zero_delta(x: Tensor) -> Tensor:
    """A zero for every Δ of x without the memory, where all of Δ is its bias."""
    return x.new_zeros(x.shape[-1]).expand_as(x)
