"""S4D, the diagonal time-invariant SSM: a long convolution over whole sequences, a recurrence token by token.

Legend: B batch, L length, D channels, N state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selective_ssm.errors import UserError, choice
from selective_ssm.layers.diagonal import (
    DiagonalConfig,
    diagonal,
    pairs_as_complex,
    sums_of_powers,
    weighted_by_powers,
    zero_delta,
)
from selective_ssm.layers.long_conv import causal_convolution, latest_first, run_packed, two_sided_convolution
from selective_ssm.layers.mixer import State, in_float32
from selective_ssm.layers.ssm import InnerSSM
from selective_ssm.ops import selective_scan, selective_scan_step


@dataclass(frozen=True, kw_only=True)
class S4DConfig(DiagonalConfig):
    """What an S4D is made of.

    Args:
        d_state: real numbers of state a channel; a complex state counts two.
        a_init: how A starts: "real" A_n = -(n + 1), or complex, "lin" A_n = -1/2 + π n i, "inv"
            A_n = -1/2 + i N/π (N / (2n + 1) - 1).
        discretization: "zoh" (exact) or "euler" (B̄ = ΔB).
        skip: whether D·x is added to the output.
        dt_min: smallest Δ drawn at the start.
        dt_max: largest Δ drawn at the start.
        bidirectional: whether an output depends on what follows, too. There is no state then: sequences are read whole.
    """

    kind: ClassVar[str] = "s4d"

    d_state: int = 64
    a_init: Literal["real", "lin", "inv"] = "lin"
    discretization: Literal["euler", "zoh"] = "zoh"
    bidirectional: bool = False

    def __post_init__(self) -> None:
        choice("a_init", self.a_init, ("real", "lin", "inv"))
        super().__post_init__()

    @property
    def is_complex(self) -> bool:
        return self.a_init != "real"


@final
class S4D(InnerSSM):
    """Time-invariant diagonal SSM: h_t = Ā h_{t-1} + B̄ x_t, y_t = C h_t + D x_t, with B = 1 (its scale lies in C).

    A sequence is convolved by FFT with the kernel K_l = C Ā^l B̄ (2 Re of it where the state is complex), to which a
    state h₀ before it adds C Ā^(t+1) h₀. Packed sequences are padded rows of such; where the state is real they run as
    a scan, whose kernels take packs as they are.

    A bidirectional one adds Σ_{j ≥ 0} K'_j x_{t+1+j} with a kernel K' that has a C of its own, C_ahead, and all else in
    common with K. It refuses states and steps.

    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models" (arXiv 2206.11893).

    Example:
        >>> s4d = S4D(S4DConfig(d_state=4), width=6, d_model=3)
        >>> y, state = s4d(torch.randn(2, 5, 6), return_state=True)
        >>> y.shape, state[0].shape, state[0].dtype
        (torch.Size([2, 5, 6]), torch.Size([2, 6, 2]), torch.complex64)
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"A_log", "A_imag", "C", "C_ahead", "D", "log_dt"})

    def __init__(self, config: S4DConfig, width: int, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.A_log = nn.Parameter(torch.empty(width, config.states))
        self.A_imag = nn.Parameter(torch.empty(width, config.states)) if config.is_complex else None
        self.C = nn.Parameter(torch.empty(width, config.d_state))
        self.C_ahead = nn.Parameter(torch.empty(width, config.d_state)) if config.bidirectional else None
        self.D = nn.Parameter(torch.empty(width)) if config.skip else None
        self.log_dt = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter anew: C normal, D one, Δ log-uniform between dt_min and dt_max."""
        n = torch.arange(self.A_log.shape[1], dtype=self.A_log.dtype, device=self.A_log.device)
        if self.A_imag is None:
            self.A_log.copy_(torch.log(n + 1).expand_as(self.A_log))
        else:
            size = self.config.d_state
            imaginary = math.pi * n if self.config.a_init == "lin" else size / math.pi * (size / (2 * n + 1) - 1)
            nn.init.constant_(self.A_log, math.log(0.5))
            self.A_imag.copy_(imaginary.expand_as(self.A_imag))
        for C in (self.C, self.C_ahead):
            if C is not None:
                nn.init.normal_(C, std=math.sqrt(0.5) if self.config.is_complex else 1.0)
        if self.D is not None:
            nn.init.ones_(self.D)
        nn.init.uniform_(self.log_dt, math.log(self.config.dt_min), math.log(self.config.dt_max))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        self._refuse_states_ahead()
        return self.config.zero_state(batch, len(self.A_log), device, dtype)

    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        if state is not None or return_state:
            self._refuse_states_ahead()
        is_bidirectional = self.C_ahead is not None
        if cu_seqlens is None and (is_bidirectional or isinstance(x.shape[1], int)):
            y, end = self._convolve(x, state, None, return_state)
        elif cu_seqlens is not None and (is_bidirectional or self.config.is_complex):
            y, end = run_packed(self._convolve, x, state, cu_seqlens, return_state)
        else:  # a length that is a symbol, in a program that is exported for any, has no FFT
            y, end = self._scan(x, state, cu_seqlens)
        return (y if z is None else y * F.silu(z)), end if return_state else None

    def step(
        self, x: Tensor, z: Tensor | None, state: State, *, state_indices: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._refuse_states_ahead()
        A, B, C, D, dt = self._system()
        y = selective_scan_step(
            state[0],
            x,
            zero_delta(x),
            A,
            B.expand(x.shape[0], -1, -1),
            C.expand(x.shape[0], -1, -1),
            D,
            delta_bias=dt,
            discretization=self.config.discretization,
            state_indices=state_indices,
        )
        return (y if z is None else y * F.silu(z)), state

    def kernel(self, length: int) -> Tensor:
        """The convolution kernel K_l = C Ā^l B̄ for l < length, (D, length), in fp32 at least."""
        return self._kernel(self.C, length)

    def _kernel(self, C: Tensor, length: int) -> Tensor:
        A, _, _, _, dt = self._system()
        return sums_of_powers(self._output(C) * self._input_scale(A, dt), dt[:, None] * A, length)

    def _refuse_states_ahead(self) -> None:
        if self.config.bidirectional:
            raise UserError("s4d: a bidirectional S4D depends on what follows, so it has no state and no step")

    def _input_scale(self, A: Tensor, dt: Tensor) -> Tensor:
        """B̄ where B = 1."""
        return dt[:, None] if self.config.discretization == "euler" else torch.expm1(dt[:, None] * A) / A

    def _convolve(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        """Rows from their states, by FFT; a `Run` of `long_conv`."""
        A, _, C, D, dt = self._system()
        rates, length = dt[:, None] * A, x.shape[1]
        if self.C_ahead is not None:
            return two_sided_convolution(x, self.kernel(length), self._kernel(self.C_ahead, length), D), None
        before = None if state is None else sums_of_powers(C * torch.exp(rates) * state[0], rates, length)
        y = causal_convolution(x, self.kernel(length), D, before)
        if not return_state:
            return y, None
        end = weighted_by_powers(latest_first(in_float32(x), lengths), rates) * self._input_scale(A, dt)
        if state is not None:
            steps = length if lengths is None else lengths[:, None, None]
            end = end + torch.exp(rates * steps) * state[0]
        return y, (end,)

    def _scan(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, State]:
        A, B, C, D, dt = self._system()
        result = selective_scan(
            x,
            zero_delta(x),
            A,
            B,
            C,
            D,
            delta_bias=dt,
            initial_state=None if state is None else state[0],
            cu_seqlens=cu_seqlens,
            discretization=self.config.discretization,
            return_final_state=True,
        )
        assert isinstance(result, tuple)
        return result[0], (result[1],)

    def _system(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """A, B, C (D, N), D and Δ (D,), in fp32 at least."""
        C = self._output(self.C)
        D = None if self.D is None else in_float32(self.D)
        return diagonal(self.A_log, self.A_imag), torch.ones_like(C), C, D, torch.exp(in_float32(self.log_dt))

    def _output(self, C: Tensor) -> Tensor:
        """C as numbers (D, N), in fp32 at least."""
        return pairs_as_complex(C) if self.config.is_complex else in_float32(C)
