"""Norms that compute in the wider of their input's and their weight's dtype, and answer in the weight's."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["rms", "layer"]


class RMSNorm(nn.RMSNorm):
    """y = x / sqrt(mean(x²) + eps) · weight, over the last axis.

    An fp32 residual stream in a bf16 model is thus normalised in fp32 and handed to the mixer in bf16.

    Example:
        >>> RMSNorm(2, eps=0.0)(torch.tensor([3.0, -3.0])).tolist()
        [1.0, -1.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        y = F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)
        return y.to(self.weight.dtype)


class LayerNorm(nn.LayerNorm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias, over the last axis."""

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, self.weight.dtype)
        y = F.layer_norm(input.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return y.to(self.weight.dtype)


def build_norm(norm: Norm, width: int, eps: float) -> RMSNorm | LayerNorm:
    """The norm of that name over `width` channels."""
    return RMSNorm(width, eps=eps) if norm == "rms" else LayerNorm(width, eps=eps)
