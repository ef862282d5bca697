"""Convolutions as long as the sequence, by FFT, and packs as padded rows: what time-invariant SSMs share.

Legend: B batch, L length, D channels, S sequences in a pack, R rows of a bucket, T their length.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.layers.mixer import State
from selective_ssm.ops import checks


def causal_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """y_t = sum_j K_j x_{t - j}, with nothing before the first token.

    Args:
        x: (B, L, D) fp32 or float64.
        kernel: (D, L) of x's dtype.

    Returns:
        y (B, L, D).

    Example:
        >>> x, kernel = torch.ones(1, 3, 1), torch.tensor([[1.0, 10.0, 100.0]])
        >>> causal_convolution(x, kernel)[0, :, 0].round().tolist()
        [1.0, 11.0, 111.0]
    """
    return _convolved(x, F.pad(kernel, (0, _unwrapped(x) - x.shape[1])))


def two_sided_convolution(x: Tensor, kernel: Tensor, ahead: Tensor) -> Tensor:
    """y_t = sum_j K_j x_{t - j} + sum_j K'_j x_{t + 1 + j}, with nothing before the first token and after the last.

    Args:
        x: (B, L, D) fp32 or float64.
        kernel: K (D, L) of x's dtype.
        ahead: K' (D, L) likewise.

    Returns:
        y (B, L, D).

    Example:
        >>> x, kernel = torch.ones(1, 3, 1), torch.tensor([[1.0, 10.0, 100.0]])
        >>> two_sided_convolution(x, kernel, 2 * kernel)[0, :, 0].round().tolist()
        [23.0, 13.0, 111.0]
    """
    between = kernel.new_zeros(len(kernel), _unwrapped(x) - 2 * x.shape[1])
    return _convolved(x, torch.cat([kernel, between, ahead.flip(-1)], 1))


def _unwrapped(x: Tensor) -> int:
    """So long that nothing of x (B, L, D) wraps around."""
    return _fast_size(2 * x.shape[1])


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """The first L outputs of the circular convolution of x (B, L, D), zeros after it, with a kernel (D, T), T >= L."""
    rows, length = x.shape[:2]
    if rows == 0 or length == 0:  # of which there is no FFT
        return x
    size = kernel.shape[1]
    spectrum = torch.fft.rfft(x, n=size, dim=1) * torch.fft.rfft(kernel.T, dim=0)
    return torch.fft.irfft(spectrum, n=size, dim=1)[:, :length]


def _fast_size(least: int) -> int:
    """The smallest m 2^k that is at least so large, with m from 5 to 8: FFTs of large prime factors take longer."""
    unit = 1 << max((least - 1).bit_length() - 3, 0)
    return -(-least // unit) * unit


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
