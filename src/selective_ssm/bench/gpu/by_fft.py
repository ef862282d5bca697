"""Long convolutions as the code of S4, S4D, H3 and Hyena runs them without kernels of its own: plain torch, map by map.

Legend: B batch, L length, D channels, N state (complex), M frequencies.

Sequences lie as (B, D, L). Kernels of S4 and S4D are made as their papers write them, with a tensor of (D, N, L) or
(D, N, M); the filter of Hyena is an MLP here and there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selective_ssm.layers import H3, S4, S4D, Hyena, HyenaFilter, Mamba, Plain, Shift
from selective_ssm.layers.conv import CausalConv1d
from selective_ssm.layers.diagonal import diagonal, pairs_as_complex
from selective_ssm.layers.mixer import in_float32

Invariant = S4D | S4 | HyenaFilter | Shift
"""The SSMs that do not change with time."""


def form(mixer: Mamba | Plain | H3 | Hyena) -> Callable[[Tensor], Tensor] | None:
    """The mixer by FFT, (B, L, width) to the same shape; None around an SSM that is no convolution."""
    if isinstance(mixer, Hyena):
        return partial(_hyena, mixer)
    ssm = mixer.ssm
    if not isinstance(ssm, S4D | S4 | HyenaFilter):
        return None
    match mixer:
        case Mamba():
            return partial(_mamba, mixer, ssm)
        case Plain():
            return partial(_plain, mixer, ssm)
        case H3():
            return partial(_h3, mixer, ssm)


def _mamba(mixer: Mamba, ssm: Invariant, x: Tensor) -> Tensor:
    u, z = _projected(x, mixer.in_proj).chunk(2, dim=1)
    u = F.silu(short_convolution(u, mixer.conv1d))
    return mixer.out_proj((long_convolution(u, ssm) * F.silu(z)).mT)


def _plain(mixer: Plain, ssm: Invariant, x: Tensor) -> Tensor:
    return mixer.out_proj(F.gelu(long_convolution(_projected(x, mixer.in_proj), ssm)).mT)


def _h3(mixer: H3, ssm: Invariant, x: Tensor) -> Tensor:
    q, k, v = _projected(x, mixer.in_proj).chunk(3, dim=1)
    return mixer.out_proj((q * long_convolution(long_convolution(k, mixer.shift) * v, ssm)).mT)


def _hyena(mixer: Hyena, x: Tensor) -> Tensor:
    y, *gates = short_convolution(_projected(x, mixer.in_proj), mixer.conv1d).chunk(len(mixer.filters) + 1, dim=1)
    for ssm, gate in zip(mixer.filters, gates, strict=True):
        y = gate * long_convolution(y, ssm)
    return mixer.out_proj(y.mT)


def _projected(x: Tensor, linear: nn.Linear) -> Tensor:
    """(B, L, D) to (B, width, L), turned by the product itself: rows are contiguous, those of a channel together."""
    y = (linear.weight @ x.flatten(0, 1).T).unflatten(1, x.shape[:2]).transpose(0, 1)
    return y if linear.bias is None else y + linear.bias.to(y.dtype)[:, None]  # pyright: ignore[reportUnnecessaryComparison]


def short_convolution(x: Tensor, conv: CausalConv1d) -> Tensor:
    """A depthwise convolution of x (B, D, L) by torch, without what may follow it."""
    width, taps = conv.weight.shape
    return F.conv1d(x, conv.weight[:, None], conv.bias, padding=taps - 1, groups=width)[..., : x.shape[-1]]


def long_convolution(x: Tensor, ssm: Invariant) -> Tensor:
    """An SSM's answer to x (B, D, L), by FFTs of length 2 L in fp32 at least."""
    length, wide = x.shape[-1], in_float32(x)
    spectrum = torch.fft.rfft(wide, n=2 * length) * torch.fft.rfft(kernel(ssm, length), n=2 * length)
    y = torch.fft.irfft(spectrum, n=2 * length)[..., :length]
    if not isinstance(ssm, Shift) and ssm.D is not None:
        y = y + ssm.D[:, None] * wide
    return y.to(x.dtype)


def kernel(ssm: Invariant, length: int) -> Tensor:
    """The answer to an impulse, (D, length), or shorter where the rest is zero."""
    match ssm:
        case S4D():
            return _s4d_kernel(ssm, length)
        case S4():
            return _s4_kernel(ssm, length)
        case HyenaFilter():
            return ssm.kernel(length)
        case Shift():
            return in_float32(ssm.conv1d.weight.flip(-1))


def _s4d_kernel(s4d: S4D, length: int) -> Tensor:
    """2 Re Σ_n C_n (e^{ΔA_n} - 1) / A_n · e^{lΔA_n}, the zero-order hold of a complex state."""
    rates = diagonal(s4d.A_log, s4d.A_imag)
    steps = torch.exp(in_float32(s4d.log_dt))[:, None] * rates
    weights = pairs_as_complex(s4d.C) * torch.expm1(steps) / rates
    powers = torch.exp(steps[..., None] * torch.arange(length, device=steps.device))
    return 2 * torch.einsum("dn,dnl->dl", weights, powers).real


def _s4_kernel(s4: S4, length: int) -> Tensor:
    """The kernel of truncated length by four Cauchy sums, Algorithm 1 of arXiv 2111.00396.

    Its C̃ = C (I - Ā^L) is what the paper's code has as a parameter, in the place of C; so ours is taken for it.
    """
    dt, rates = torch.exp(in_float32(s4.log_dt))[:, None], diagonal(s4.A_log, s4.A_imag)
    P, B, C = (pairs_as_complex(pairs) for pairs in (s4.P, s4.B, s4.C))
    angle = -2 * torch.pi / length * torch.arange(length // 2 + 1, device=dt.device, dtype=torch.float64)
    omega = torch.polar(torch.ones_like(angle), angle).to(rates.dtype)
    g, s = 1 - omega, dt / 2 * (1 + omega)  # (M,), (D, M)
    ahead, across = (1 / (g - s[:, None] * some[..., None]) for some in (rates, rates.conj()))  # (D, N, M)
    weights = torch.stack([C * dt * B, P.conj() * dt * B, C * P, P.conj() * P])
    sums = torch.einsum("kdn,dnm->kdm", weights, ahead) + torch.einsum("kdn,dnm->kdm", weights.conj(), across)
    seen, by_P, corner, norm = sums.unbind()
    return torch.fft.irfft(seen - s * corner * by_P / (1 + s * norm), n=length)
