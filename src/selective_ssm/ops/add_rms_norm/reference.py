"""The add and the norm in plain torch: the specification that the kernel is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns y in `dtype`, and the sum, rounded to the residual's dtype before it is normalised."""
    total = (residual + x).to(residual.dtype)
    y = F.rms_norm(_wide(total), weight.shape, _wide(weight), eps)
    return y.to(dtype), total


def backward(
    d_y: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns the gradients of residual, x (None where the residual's serves) and weight."""
    wide = _wide(total)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normal = wide * scale
    d_y = _wide(d_y)
    d_weight = (d_y * normal)[None].flatten(0, -2).sum(0)
    d_normal = d_y * _wide(weight)
    d = (d_normal - normal * (d_normal * normal).mean(-1, keepdim=True)) * scale
    d = d if d_total is None else d + d_total
    return d.to(total.dtype), None if dtype == total.dtype else d.to(dtype), d_weight.to(weight.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
