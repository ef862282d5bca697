"""A linear system whose A is diagonal plus low-rank, A = Λ - P P*, in discrete time: its recurrence and its kernels.

Legend: D channels, N state (complex; each number stands for itself and its conjugate), J inputs, L length, R rows.

With the bilinear rule, (I - Δ/2 A) h_t = (I + Δ/2 A) h_{t-1} + Δ B x_t, so that

    Ā = (I - Δ/2 A)^-1 (I + Δ/2 A),   B̄ = (I - Δ/2 A)^-1 Δ B,

both of which act on a vector in time O(N), since P P* is of rank one (Woodbury). As Λ has a negative real part, and
P P* is taken from it, Ā makes no vector longer, whatever training does.

Source: Gu, Goel & Ré, "Efficiently Modeling Long Sequences with Structured State Spaces" (arXiv 2111.00396), section
3.3, appendices C.2 (recurrence) and C.3 (kernel); Λ - P P* in the place of Λ - P Q*: Goel et al. (arXiv 2202.09729).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from selective_ssm.layers.diagonal import as_pairs, pairs_as_complex
from selective_ssm.layers.mixer import without_autocast
from selective_ssm.ops import checks

_AT_ONCE = 1 << 24
"""Numbers of a Cauchy matrix that are in memory together."""


def pair_dot(a: Tensor, b: Tensor) -> Tensor:
    """sum_n a_n b_n over states and their conjugates, (…, N) to (…,), real."""
    return 2 * (a * b).real.sum(-1)


@dataclass(frozen=True)
class DPLR:
    """The system of D independent channels: A = diag(rates) - P P*, step sizes Δ, outputs C."""

    rates: Tensor  # Λ (D, N) complex, of negative real part
    P: Tensor  # (D, N) complex
    C: Tensor  # (D, N) complex
    dt: Tensor  # (D, 1) real, as are all of its precision

    def advance(self, h: Tensor, drive: Tensor | float = 0.0) -> Tensor:
        """(I - Δ/2 A)^-1 ((I + Δ/2 A) h + drive), of (…, D, N): Ā h, or a step where the drive is Δ B x."""
        return self._solve(self.explicit_half(h) + drive)

    def explicit_half(self, h: Tensor) -> Tensor:
        """(I + Δ/2 A) h."""
        return h + self.dt / 2 * (self.rates * h - self.P * pair_dot(self.P.conj(), h)[..., None])

    def _solve(self, h: Tensor) -> Tensor:
        """(I - Δ/2 A)^-1 h."""
        inverse = 1 / (1 - self.dt / 2 * self.rates)
        seen = pair_dot(self.P.conj(), inverse * h)[..., None]
        weight = self.dt / 2 / (1 + self.dt / 2 * pair_dot(self.P.conj(), inverse * self.P)[..., None])
        return inverse * (h - self.P * (weight * seen))

    def powers(self, length: int) -> list[Tensor]:
        """Ā, Ā², Ā⁴, … as real matrices (D, 2 N, 2 N) on pairs, as far as a power of up to `length` needs."""
        size = 2 * self.rates.shape[1]
        basis = pairs_as_complex(torch.eye(size, dtype=self.dt.dtype, device=self.dt.device))
        columns = self.advance(basis[:, None].expand(-1, *self.rates.shape))
        powers = [as_pairs(columns).permute(1, 2, 0)]
        with without_autocast(self.dt.device):
            while 1 << len(powers) <= length:
                powers.append(powers[-1] @ powers[-1])
        return powers

    def responses(self, drives: Tensor, length: int, powers: Sequence[Tensor]) -> Tensor:
        """C Ā^l (I - Δ/2 A)^-1 v for every l < length.

        Of v = Δ B this is the kernel; of v = (I + Δ/2 A) h, what a state h adds to the outputs after it. It is the
        inverse Fourier transform of a function that is cheap at the roots of unity: with C̃ = C (I - Ā^L), which takes
        away what lies beyond L,

            sum_l C Ā^l (I - Δ/2 A)^-1 v ω^l = C̃ ((1 - ω) I - Δ/2 (1 + ω) A)^-1 v   where ω^L = 1.

        With ω = exp(2 i φ), t = 2 sin φ and s = Δ cos φ this is exp(-i φ) C̃ (-i t I - s A)^-1 v, where all is real but
        A and i. The inverse is that of a diagonal and a correction of rank one: four dot products with
        1 / (-i t - s λ). Written like this, and not with t / s, nothing is infinite at ω = -1.

        Args:
            drives: v (J, D, N) complex.
            length: L.
            powers: those of `powers` for L.

        Returns:
            (J, D, L) real.
        """
        if length == 0:
            return self.dt.new_empty(*drives.shape[:2], 0)
        row = as_pairs(self.C.conj_physical())  # so that row · pairs(h) is the real part of C h
        C = pairs_as_complex(row - raised([power.mT for power in powers], row[None], length)[0]).conj()
        conjugate = self.P.conj()
        products = torch.cat([C * drives, conjugate * drives, (C * self.P)[None], (conjugate * self.P)[None]])
        half_angle = -torch.pi / length * torch.arange(length // 2 + 1, device=self.dt.device, dtype=torch.float64)
        t, cosine = 2 * half_angle.sin().to(self.dt), half_angle.cos().to(self.dt)
        s = self.dt * cosine
        seen, by_P, corner, norm = self._cauchy(products, t, s).split([len(drives), len(drives), 1, 1])
        phase = torch.complex(cosine, -t / 2)
        return torch.fft.irfft(phase * (seen - s * corner * by_P / (1 + s * norm)), n=length)

    def _cauchy(self, products: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """sum_n a_n / (-i t - s λ_n) + its conjugates' for products a (K, D, N), t (M,) and s (D, M): (K, D, M).

        A state and its conjugate are one term, -2 (i t Re a + s Re(a λ̄)) / (s² |λ|² - t² + 2 i s t Re λ). The matrix
        (D, M, N) is made a few nodes at a time, and again in the backward pass.
        """
        weights = torch.cat([products.real, (products * self.rates.conj()).real]).permute(1, 2, 0)
        step = max(1, _AT_ONCE // self.rates.numel())
        run = (
            partial(checkpoint, _cauchy_sums, use_reentrant=False, preserve_rng_state=False)
            if len(t) > step
            else _cauchy_sums
        )
        with without_autocast(self.dt.device):
            pieces = [run(weights, self.rates, *some) for some in zip(t.split(step), s.split(step, 1), strict=True)]
        return torch.cat(pieces, 1).permute(2, 0, 1)

    def end_of(self, drive: Tensor, latest: Tensor, powers: Sequence[Tensor]) -> Tensor:
        """sum_l Ā^l (I - Δ/2 A)^-1 v x_l, the state that inputs leave, the latest of which is x_0.

        Inputs are summed a block of T at a time, T about 2 N, and the blocks two by two: as much work as O(N) a token.

        Args:
            drive: v (D, N) complex.
            latest: x (R, L, D) real.
            powers: those of `powers` for L.

        Returns:
            (R, D, N) complex.
        """
        vectors = as_pairs(self._solve(drive))[None]
        doublings = min(len(powers) - 1, (2 * self.rates.shape[1] - 1).bit_length())
        with without_autocast(self.dt.device):
            for power in powers[:doublings]:  # Ā^l B̄ for l < T, (T, D, 2 N)
                vectors = torch.cat([vectors, _apply(power, vectors)])
            size = len(vectors)
            blocks = F.pad(latest, (0, 0, 0, -latest.shape[1] % size)).unflatten(1, (-1, size))
            ends = torch.einsum("rmtd,tdn->mrdn", blocks, vectors)
            for power in powers[doublings:]:
                if len(ends) == 1:
                    break
                ends = F.pad(ends, (0, 0) * 3 + (0, len(ends) % 2)).unflatten(0, (-1, 2))
                ends = ends[:, 0] + _apply(power, ends[:, 1])
        return pairs_as_complex(ends.sum(0))


def _cauchy_sums(weights: Tensor, rates: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """`DPLR._cauchy` for a few nodes: weights (D, N, 2 K) real, to (D, M, K)."""
    squared = rates.real.square() + rates.imag.square()
    sums: Any = _Sums.apply(weights, squared, rates.real, s.square(), 2 * t * s, t.square())
    ahead, across = sums.chunk(2, -1)
    return -2 * (1j * t[:, None] * ahead + s[..., None] * across)


class _Sums(torch.autograd.Function):
    """Sums w_n / (p a_n - c + i q r_n) over n, for w (D, N, K), a and r (D, N), p and q (D, M), c (M,): (D, M, K).

    All are real, and c is a constant. By hand, as to differentiate each step in which the matrix (D, M, N) is made
    takes three times as many passes over memory.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, a: Tensor, r: Tensor, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        real = torch.addcmul(-c[:, None], p[..., None], a[:, None])
        conjugate = torch.complex(real, -q[..., None] * r[:, None]).reciprocal_()
        ctx.save_for_backward(conjugate, w, a, r, p, q)
        return (conjugate @ w.to(conjugate)).conj_physical_()

    @staticmethod
    def backward(ctx: Any, d_sums: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        checks.differentiated_once("S4's kernel")
        conjugate, w, a, r, p, q = ctx.saved_tensors
        dw = (conjugate.mT @ d_sums).real
        d_denominator = (d_sums @ -w.mT.to(d_sums)).mul_(conjugate).mul_(conjugate)
        of_states = d_denominator.mT @ torch.stack([p, q], -1).to(d_sums)
        of_nodes = d_denominator @ torch.stack([a, r], -1).to(d_sums)
        da, dr = of_states[..., 0].real, of_states[..., 1].imag
        dp, dq = of_nodes[..., 0].real, of_nodes[..., 1].imag
        return dw, da, dr, dp, dq, None


def raised(powers: Sequence[Tensor], h: Tensor, exponents: Tensor | int) -> Tensor:
    """Ā^e h for states h as pairs (R, D, 2 N) and an exponent e, one for all or one a row, given Ā, Ā², Ā⁴, …."""
    with without_autocast(h.device):
        for place, power in enumerate(powers):
            bit = exponents >> place & 1
            if isinstance(bit, Tensor):
                h = torch.where(bit[:, None, None] == 1, _apply(power, h), h)
            elif bit:
                h = _apply(power, h)
    return h


def _apply(matrix: Tensor, h: Tensor) -> Tensor:
    """A matrix a channel (D, M, M) to each of (…, D, M)."""
    return torch.einsum("dij,...dj->...di", matrix, h)
