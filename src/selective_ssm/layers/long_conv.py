"""Convolutions as long as the sequence, by FFT, and packs as padded rows: what time-invariant SSMs share.

Legend: B batch, L length, D channels, S sequences in a pack, R rows of a bucket, T their length.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from selective_ssm.layers.mixer import State
from selective_ssm.ops import checks

_AT_ONCE = 1 << 24
"""Numbers of spectra whose products are in memory together: with fewer a GPU waits for launches."""


def causal_convolution(x: Tensor, kernel: Tensor, skip: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """y_t = sum_j K_j x_{t - j} + D x_t + c_t, with nothing before the first token.

    It is rounded once, and can be differentiated once.

    Args:
        x: (B, L, D), of any floating dtype.
        kernel: K (D, L) fp32 or float64, in which all is computed.
        skip: D (D,) in the kernel's dtype, or None for 0. It is added to K_0, which costs no pass over x.
        offset: c (B, D, L) likewise.

    Returns:
        y (B, L, D) in x's dtype.

    Example:
        >>> x, kernel = torch.ones(1, 3, 1), torch.tensor([[1.0, 10.0, 100.0]])
        >>> causal_convolution(x, kernel)[0, :, 0].round().tolist()
        [1.0, 11.0, 111.0]
    """
    return _convolved(x, _with_skip(kernel, skip), offset)


def two_sided_convolution(x: Tensor, kernel: Tensor, ahead: Tensor, skip: Tensor | None = None) -> Tensor:
    """y_t = sum_j K_j x_{t - j} + sum_j K'_j x_{t + 1 + j} + D x_t, nothing before the first token or after the last.

    It is rounded once, and can be differentiated once.

    Args:
        x: (B, L, D), of any floating dtype.
        kernel: K (D, L) fp32 or float64, in which all is computed.
        ahead: K' (D, L) likewise.
        skip: D (D,) likewise, or None for 0.

    Returns:
        y (B, L, D) in x's dtype.

    Example:
        >>> x, kernel = torch.ones(1, 3, 1), torch.tensor([[1.0, 10.0, 100.0]])
        >>> two_sided_convolution(x, kernel, 2 * kernel)[0, :, 0].round().tolist()
        [23.0, 13.0, 111.0]
    """
    between = kernel.new_zeros(len(kernel), _unwrapped(x) - 2 * x.shape[1])
    return _convolved(x, torch.cat([_with_skip(kernel, skip), between, ahead.flip(-1)], 1), None)


def _with_skip(kernel: Tensor, skip: Tensor | None) -> Tensor:
    return kernel if skip is None else torch.cat([kernel[:, :1] + skip[:, None], kernel[:, 1:]], 1)


def _unwrapped(x: Tensor) -> int:
    """So long that nothing of x (B, L, D) wraps around."""
    return _fast_size(2 * x.shape[1])


def _fast_size(least: int) -> int:
    """The smallest m 2^k that is at least so large, m of few factors: FFTs of large prime ones take longer."""
    return min(m << (-(-least // m) - 1).bit_length() for m in (1, 3, 5, 7, 9, 15))


def _convolved(x: Tensor, kernel: Tensor, offset: Tensor | None) -> Tensor:
    """The first L outputs of the circular convolution of x (B, L, D) with a kernel (D, T), zeros after either."""
    if x.shape[0] == 0 or x.shape[1] == 0:  # of which there is no FFT
        return x
    return _Convolution.apply(x, kernel, offset, _unwrapped(x))  # pyright: ignore[reportReturnType]


class _Convolution(torch.autograd.Function):
    """A circular convolution with as few passes over memory as FFTs of contiguous rows need.

    Casts and transpositions happen in the copies into and out of padded rows (B, D, size), and the kernel's spectrum is
    what divides by the size. The spectrum of x is kept for the backward pass: to make it again would be a quarter more
    passes there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, offset: Tensor | None, size: int) -> Tensor:
        weights = torch.fft.rfft(kernel, n=size, norm="forward")
        spectrum = torch.fft.rfft(_padded(x, kernel.dtype, size))
        is_learned = ctx.needs_input_grad[1]
        ctx.save_for_backward(spectrum if is_learned else None, weights)
        ctx.size, ctx.taps = size, kernel.shape[1]
        product = spectrum * weights if is_learned else spectrum.mul_(weights)
        return _cut(torch.fft.irfft(product, n=size, norm="forward"), x, offset)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        checks.differentiated_once("a long convolution")
        spectrum, weights = ctx.saved_tensors
        by_x, by_kernel, by_offset, _ = ctx.needs_input_grad
        padded = _padded(dy, weights.real.dtype, ctx.size)
        d_offset = padded[..., : dy.shape[1]] if by_offset else None
        d_spectrum = torch.fft.rfft(padded)
        dx = d_kernel = None
        if by_kernel:
            d_kernel = torch.fft.irfft(_correlated(d_spectrum, spectrum), n=ctx.size)[:, : ctx.taps]
        if by_x:
            d_spectrum.mul_(weights.conj())
            dx = _cut(torch.fft.irfft(d_spectrum, n=ctx.size, norm="forward"), dy, None)
        return dx, d_kernel, d_offset, None


def _padded(x: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """Rows (B, D, size) in a dtype: x (B, L, D), then zeros."""
    padded = x.new_empty(x.shape[0], x.shape[2], size, dtype=dtype)
    padded[..., : x.shape[1]].copy_(x.mT)
    padded[..., x.shape[1] :].zero_()
    return padded


def _cut(rows: Tensor, like: Tensor, offset: Tensor | None) -> Tensor:
    """The first L of rows (B, D, size), which are written to, plus an offset; as (B, L, D), of the dtype of another."""
    rows = rows[..., : like.shape[1]]
    if offset is not None:
        rows += offset
    return like.new_empty(like.shape).copy_(rows.mT)


def _correlated(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a b* over the first axis, some rows at a time, so that products take little memory."""
    total = torch.zeros_like(a[0])
    rows = max(1, _AT_ONCE // total.numel())
    for some, others in zip(a.split(rows), b.split(rows), strict=True):
        total += (some * others.conj()).sum(0)
    return total


def latest_first(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Each row's tokens from its last to its first.

    Args:
        x: (R, T, D), rows padded with zeros.
        lengths: (R,) how many tokens each row has; None for T.

    Returns:
        (R, T, D), padded with zeros.
    """
    if lengths is None:
        return x.flip(1)
    place = (lengths[:, None] - 1 - torch.arange(x.shape[1], device=x.device))[..., None]
    return x.gather(1, place.clamp_min(0).expand_as(x)).masked_fill(place < 0, 0)


class Run(Protocol):
    """Acts on rows x (R, T, D), each from its own state, of which the first `lengths` (R,) tokens are no padding.

    Returns y (R, T, D) and the states after each row's last token, or None where not asked for.
    """

    def __call__(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]: ...


def run_packed(
    run: Run, x: Tensor, state: State | None, cu_seqlens: Tensor, return_state: bool
) -> tuple[Tensor, State | None]:
    """Runs over packed sequences as over padded rows, those of a like length together.

    Rows are padded to a power of two, so that at most half of the work is padding, and `run` is called as often as the
    longest sequence has binary digits. The boundaries are read on the host.

    Args:
        run: what acts on rows; its states are tensors of one size whatever the length.
        x: (1, L, D).
        state: one row a sequence, or None.
        cu_seqlens: (S + 1,) boundaries from 0 to L.
        return_state: whether the states are wanted.

    Returns:
        y (1, L, D), and the states or None.

    Raises:
        ValueError, TypeError: boundaries that are none.
    """
    checks.cu_seqlens(cu_seqlens, *x.shape[:2])
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    buckets: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths.tolist()):
        buckets.setdefault(1 << (length - 1).bit_length() if length else 0, []).append(sequence)
    ys: list[Tensor] = []
    tokens: list[Tensor] = []
    ends: list[State] = []
    for size, members in buckets.items():
        rows = torch.tensor(members, device=x.device)
        position = torch.arange(size, device=x.device)
        is_token = position < lengths[rows, None]
        token = (starts[rows, None] + position).clamp_max(x.shape[1] - 1)
        padded = x[0, token].masked_fill(~is_token[..., None], 0)
        own = None if state is None else tuple(part[rows] for part in state)
        y, end = run(padded, own, lengths[rows], return_state)
        ys.append(y[is_token])
        tokens.append(token[is_token])
        ends.append(end or ())
    y = torch.cat(ys)[torch.cat(tokens).argsort()][None]
    if not return_state:
        return y, None
    order = torch.tensor([row for members in buckets.values() for row in members], device=x.device).argsort()
    return y, tuple(torch.cat(parts)[order] for parts in zip(*ends, strict=True))
