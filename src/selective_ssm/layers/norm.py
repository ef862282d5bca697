"""Norms that compute in the wider of their input's and their weight's dtype, and answer in the weight's."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selective_ssm.ops import add_rms_norm

Norm = Literal["rms", "layer"]


class RMSNorm(nn.RMSNorm):
    """y = x / sqrt(mean(x²) + eps) · weight, over the last axis.

    An fp32 residual stream in a bf16 model is thus normalised in fp32 and handed to the mixer in bf16.

    Example:
        >>> RMSNorm(2, eps=0.0)(torch.tensor([3.0, -3.0])).tolist()
        [1.0, -1.0]
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        y = F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)
        return y.to(self.weight.dtype)

    def add(self, residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of residual + branch, and the sum, in one pass over memory."""
        assert self.eps is not None
        return add_rms_norm(branch, residual, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias, over the last axis."""

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, self.weight.dtype)
        y = F.layer_norm(input.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return y.to(self.weight.dtype)

    def add(self, residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of residual + branch, and the sum."""
        total = residual + branch
        return self(total), total


def rms_normed(x: Tensor, eps: float) -> Tensor:
    """The RMSNorm of x over its last axis, without a weight and in x's dtype: x / sqrt(mean(x²) + eps).

    It is the norm of a sum whose other half is zero: one kernel, which the recording of a step can hold.

    Example:
        >>> rms_normed(torch.tensor([3.0, -3.0]), eps=0.0).tolist()
        [1.0, -1.0]
    """
    return add_rms_norm(x, x.new_zeros(x.shape), x.new_ones(x.shape[-1]), eps)[0]


def build_norm(norm: Norm, width: int, eps: float) -> RMSNorm | LayerNorm:
    """The norm of that name over `width` channels."""
    return RMSNorm(width, eps=eps) if norm == "rms" else LayerNorm(width, eps=eps)
