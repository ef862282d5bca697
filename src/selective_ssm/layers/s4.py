"""S4, the structured state space: a dense A that remembers by Legendre polynomials, as diagonal plus low-rank.

Legend: B batch, L length, D channels (the block's width), N state (complex pairs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selective_ssm.errors import UserError
from selective_ssm.layers.checks import require_positive
from selective_ssm.layers.diagonal import as_pairs, diagonal, pairs_as_complex
from selective_ssm.layers.dplr import DPLR, pair_dot, raised
from selective_ssm.layers.long_conv import causal_convolution, latest_first, run_packed
from selective_ssm.layers.mixer import State, in_float32
from selective_ssm.layers.ssm import InnerSSM, SSMConfig
from selective_ssm.ops.slots import Slots


@dataclass(frozen=True, kw_only=True)
class S4Config(SSMConfig):
    """What an S4 is made of.

    Args:
        d_state: real numbers of state a channel; even, as states are complex pairs.
        skip: whether D·x is added to the output.
        dt_min: smallest Δ drawn at the start.
        dt_max: largest Δ drawn at the start.
    """

    kind: ClassVar[str] = "s4"

    d_state: int = 64
    skip: bool = True
    dt_min: float = 1e-3
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self, "d_state", "dt_min", "dt_max")
        if self.d_state % 2:
            raise UserError(f"s4: d_state must be even, got {self.d_state}")
        if self.dt_min > self.dt_max:
            raise UserError(f"s4: dt_min must not exceed dt_max, got {self.dt_min} and {self.dt_max}")


def hippo_legs(size: int) -> tuple[Tensor, Tensor]:
    """The HiPPO-LegS system in float64: A (size, size) and B (size,).

    A_nk = -sqrt((2n + 1)(2k + 1)) below the diagonal, -(n + 1) on it, 0 above; B_n = sqrt(2n + 1).

    Source: arXiv 2111.00396, equation 2.

    Example:
        >>> hippo_legs(2)[0].tolist()
        [[-1.0, -0.0], [-1.7320508075688772, -2.0]]
    """
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    root = torch.sqrt(2 * n + 1)
    return -torch.tril(torch.outer(root, root), -1) - torch.diag(n + 1), root


def nplr_legs(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS in the basis in which it is diagonal plus low-rank: Λ, P and B, (size / 2,) complex, in float64.

    A + p pᵀ with p_n = sqrt(n + 1/2) is -1/2 plus a skew-symmetric matrix, hence normal: V Λ V* with a unitary V and
    imaginary parts in pairs of opposite sign, of which the positive ones are kept. P = V* p and B = V* b.

    Source: arXiv 2111.00396, section 3.2, theorem 1, and appendix C.1.
    """
    A, b = hippo_legs(size)
    p = b / math.sqrt(2)
    skew = A + torch.outer(p, p) + torch.eye(size, dtype=A.dtype, device="cpu") / 2
    imaginary, V = torch.linalg.eigh(-1j * skew)
    imaginary, V = imaginary[size // 2 :], V[:, size // 2 :]
    projected = V.mH @ torch.stack([p, b], 1).to(V.dtype)
    return torch.complex(torch.full_like(imaginary, -0.5), imaginary), projected[:, 0], projected[:, 1]


@final
class S4(InnerSSM):
    """Time-invariant SSM with A = Λ - P P*: h_t = Ā h_{t-1} + B̄ x_t, y_t = 2 Re(C h_t) + D x_t, Δ a channel's own.

    Sequences are convolved by FFT with the kernel C Ā^l B̄, whose Fourier transform is a few Cauchy sums; a state before
    them adds C Ā^(t+1) h₀, a kernel like the first. What lies beyond L is taken off the kernel with Ā^L, which is made
    by squaring, in time O(N³ log L) a channel. Packed sequences are padded rows.

    A step applies Ā in its diagonal plus low-rank form, in time O(N). The fully diagonal form would save the second of
    its two dot products, and is not taken: HiPPO's eigenvectors are so nearly parallel that numbers do not survive them
    (lemma 3.2 of the paper: entries as large as 2^(4N/3)).

    Source: Gu, Goel & Ré, "Efficiently Modeling Long Sequences with Structured State Spaces" (arXiv 2111.00396).

    Example:
        >>> s4 = S4(S4Config(d_state=4), width=6, d_model=3)
        >>> y, state = s4(torch.randn(2, 5, 6), return_state=True)
        >>> y.shape, state[0].shape, state[0].dtype
        (torch.Size([2, 5, 6]), torch.Size([2, 6, 2]), torch.complex64)
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"A_log", "A_imag", "P", "B", "C", "D", "log_dt"})

    def __init__(self, config: S4Config, width: int, d_model: int) -> None:
        super().__init__()
        self.config = config
        size = config.d_state
        self.A_log = nn.Parameter(torch.empty(width, size // 2))
        self.A_imag = nn.Parameter(torch.empty(width, size // 2))
        self.P = nn.Parameter(torch.empty(width, size))
        self.B = nn.Parameter(torch.empty(width, size))
        self.C = nn.Parameter(torch.empty(width, size))
        self.D = nn.Parameter(torch.empty(width)) if config.skip else None
        self.log_dt = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter anew: A and B of HiPPO-LegS, C normal, D one, Δ log-uniform between its bounds."""
        rates, P, B = nplr_legs(self.config.d_state)
        starts = (torch.log(-rates.real), rates.imag, as_pairs(P), as_pairs(B))
        for parameter, start in zip((self.A_log, self.A_imag, self.P, self.B), starts, strict=True):
            parameter.copy_(start.expand_as(parameter))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        if self.D is not None:
            nn.init.ones_(self.D)
        nn.init.uniform_(self.log_dt, math.log(self.config.dt_min), math.log(self.config.dt_max))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        dtype = torch.promote_types(dtype, torch.complex64)
        return (torch.zeros(batch, *self.A_log.shape, device=device, dtype=dtype),)

    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        if cu_seqlens is None:
            y, end = self._convolve(x, state, None, return_state)
        else:
            y, end = run_packed(self._convolve, x, state, cu_seqlens, return_state)
        return (y if z is None else y * F.silu(z)), end

    def step(
        self, x: Tensor, z: Tensor | None, state: State, *, state_indices: Tensor | None = None
    ) -> tuple[Tensor, State]:
        system, drive = self._system()
        wide, slots = in_float32(x), Slots.named(state_indices, len(x), state[0])
        h = system.advance(slots.take(state[0]), drive * wide[..., None])
        slots.put(state[0], h)
        y = pair_dot(system.C, h)
        y = (y if self.D is None else y + self.D * wide).to(x.dtype)
        return (y if z is None else y * F.silu(z)), state

    def kernel(self, length: int) -> Tensor:
        """The convolution kernel K_l = 2 Re(C Ā^l B̄) for l < length, (D, length), in fp32 at least."""
        system, drive = self._system()
        return system.responses(drive[None], length, system.powers(length))[0]

    def _convolve(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        """Rows from their states, by FFT; a `Run` of `long_conv`."""
        system, drive = self._system()
        length = x.shape[1]
        powers = system.powers(length)
        before = drive.new_empty(0, *drive.shape) if state is None else state[0]
        responses = system.responses(torch.cat([drive[None], system.explicit_half(before)]), length, powers)
        skip = None if self.D is None else in_float32(self.D)
        y = causal_convolution(x, responses[0], skip, None if state is None else responses[1:])
        if not return_state:
            return y, None
        end = system.end_of(drive, latest_first(in_float32(x), lengths), powers)
        if state is not None:
            steps = length if lengths is None else lengths
            end = end + pairs_as_complex(raised(powers, as_pairs(state[0]), steps))
        return y, (end,)

    def _system(self) -> tuple[DPLR, Tensor]:
        """The system in fp32 at least, and Δ B (D, N)."""
        dt = torch.exp(in_float32(self.log_dt))[:, None]
        rates, P, B, C = diagonal(self.A_log, self.A_imag), *map(pairs_as_complex, (self.P, self.B, self.C))
        return DPLR(rates, P, C, dt), dt * B
