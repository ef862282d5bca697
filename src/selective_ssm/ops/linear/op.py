"""A linear map: torch's own, or a kernel that reads the weight at memory's speed, for few vectors on a CPU.

    out = x weight^T + bias.

Legend: M vectors, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from selective_ssm.ops import native
from selective_ssm.ops.dispatch import Case, choose
from selective_ssm.ops.linear import cpu
from selective_ssm.ops.registration import call, define


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`, by a kernel where it can run: for up to 8 vectors on a CPU, and no gradient.

    The kernel takes sums in fp32 and rounds once; a vector's result does not depend on those beside it.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,) or None.

    Returns:
        x weight^T + bias, (..., N).

    Example:
        >>> linear(torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
        tensor([11., 17.])
    """
    if torch.compiler.is_compiling() or not _is_served(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()
    out = call(_LINEAR, False, rows, weight, bias)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], len(weight))


def _is_served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.is_cpu
        and weight.is_cpu
        and 0 < x.numel() <= cpu.MOST_VECTORS * x.shape[-1]
        and x.dtype == weight.dtype
        and weight.dim() == 2
        and weight.shape[1] == x.shape[-1]
        and weight.stride(1) == 1
        and (bias is None or (bias.is_cpu and bias.dtype in native.NUMBERS and bias.shape == weight.shape[:1]))
        and not _is_differentiated(x, weight, bias)
        and not torch.is_autocast_enabled("cpu")
        and type(x) is Tensor
        and type(weight) in (Tensor, torch.nn.Parameter)
        and choose(Case("linear", "cpu", x.dtype, complex_state=False)) == "cpu"
    )


def _is_differentiated(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:  # pyright: ignore[reportPrivateUsage]
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    served = x.dim() == 2 and x.stride(1) == 1 and _is_served(x, weight, bias)
    return cpu.forward(x, weight, bias) if served else F.linear(x, weight, bias)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(weight))


_LINEAR = define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _forward, _fake_forward)
