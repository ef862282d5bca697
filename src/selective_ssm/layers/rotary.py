"""Positions as rotations of queries and keys (RoPE), and the decay that xPos adds to them.

Legend: B batch, L length, H heads, P head dim (even).
"""

from __future__ import annotations

import torch
from torch import Tensor

from selective_ssm.layers.mixer import in_float32

_GAMMA = 0.4  # xPos: how far the decay of the slowest pair is from 0
_SPAN = 512.0  # xPos: tokens over which a pair decays by its ζ


def rotate(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Turn each pair of neighbours (x_2i, x_2i+1) by the angle n θ_i, θ_i = base^(-2i/P).

    The product of a query at n and a key at m then depends on n - m and on no other position. Angles are made in
    float64 from whole positions: in fp32 those at n = 10⁶ are off by 0.02.

    Args:
        x: (B, L, H, P).
        positions: (B, L) or (1, L) int64.
        base: of the angles' geometric series.

    Returns:
        (B, L, H, P) in the dtype of x.

    Source: Su et al., "RoFormer" (arXiv 2104.09864), section 3.2.2 and equation 34.

    Example:
        >>> rotate(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[10**6]])).flatten()
        tensor([ 0.9368, -0.3500])
    """
    pairs = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=torch.float64)
    angles = positions[..., None, None] * base ** (-pairs / x.shape[-1])  # (B, L, 1, P / 2)
    wide = in_float32(x).unflatten(-1, (-1, 2)).contiguous()
    turns = torch.stack([angles.cos(), angles.sin()], -1).to(wide.dtype)
    if torch.compiler.is_compiling() or wide.storage_offset() % 2:  # where there are no complex numbers
        (even, odd), (cos, sin) = wide.unbind(-1), turns.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(wide) * torch.view_as_complex(turns))
    return turned.flatten(-2).to(x.dtype)


def xpos_decay(x: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the pairs of x by ζ_i^(n/512), n being an offset and ζ_i = (2i/P + γ) / (1 + γ), γ = 0.4.

    A query times the decay of n and a key times that of -m have a product that fades with n - m. Either alone leaves
    the range of numbers after some ten thousand tokens, so offsets are to be measured from a place that is near.

    Args:
        x: (B, L, H, P).
        offsets: (B, L) or (1, L) whole numbers, of either sign.

    Returns:
        (B, L, H, P) in the dtype of x.

    Source: Sun et al., "A Length-Extrapolatable Transformer" (arXiv 2212.10554), section 2.2 and Algorithm 1.
    """
    wide = in_float32(x)
    pairs = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=wide.dtype)
    rates = torch.log((pairs / x.shape[-1] + _GAMMA) / (1 + _GAMMA)) / _SPAN
    decay = torch.exp(rates * offsets[..., None, None]).repeat_interleave(2, dim=-1)
    return (wide * decay).to(x.dtype)
