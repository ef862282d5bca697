"""A linear map: torch's own, or for few vectors kernels that read the weight at memory's speed.

    out = x weight^T + bias.

Legend: M vectors, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from selective_ssm.ops.dispatch import Case, choose
from selective_ssm.ops.linear import cpu, cuda
from selective_ssm.ops.registration import call, define


class Backend(Protocol):
    """What a module must offer to run the map; M vectors are few, and strides in K are 1."""

    def takes(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether so many vectors, laid out in memory as these tensors are, are better served here than by torch."""
        ...

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns (M, N), of x (M, K), weight (N, K) and bias (N,)."""
        ...


_BACKENDS: Mapping[str, Backend] = {"cpu": cpu, "cuda": cuda}
_MOST_VECTORS = max(cpu.MOST_VECTORS, *cuda.MOST_VECTORS.values())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`, by a kernel where it can run: for few vectors and no gradient.

    On a CPU up to 8 vectors of fp32 or bf16; on a GPU up to 128 of bf16 or fp16, or 8 of fp32, where rows are whole
    numbers of 16 bytes, but no more than 16 with a weight of more than 2^22 numbers. The kernels take sums in fp32 and
    round once; a vector's result does not depend on those beside it, nor on how many there are, but that up to 16 may
    be summed in another order than more.

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
    backend = None if torch.compiler.is_compiling() else _backend(x, weight, bias)
    if backend is None:
        return F.linear(x, weight, bias)
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()
    out = call(_LINEAR, False, rows, weight, bias, backend)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], len(weight))


def _backend(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Whose kernel is asked: a backend's name, or None for torch's."""
    if not 0 < x.numel() <= _MOST_VECTORS * x.shape[-1]:
        return None
    device = x.device.type
    if (
        device not in _BACKENDS
        or type(x) is not Tensor
        or type(weight) not in (Tensor, torch.nn.Parameter)
        or weight.dim() != 2
        or _is_differentiated(x, weight, bias)
        or torch.is_autocast_enabled(device)
    ):
        return None
    chosen = choose(Case("linear", device, x.dtype, complex_state=False))
    return chosen if chosen in _BACKENDS else None


def _is_differentiated(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:  # pyright: ignore[reportPrivateUsage]
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    chosen, device = _BACKENDS[backend], x.device
    is_served = (
        x.dtype == weight.dtype
        and weight.device == device
        and x.dim() == 2
        and x.shape[1:] == weight.shape[1:]
        and x.stride(1) == weight.stride(1) == 1
        and (bias is None or (bias.device == device and bias.shape == weight.shape[:1]))
        and chosen.takes(x, weight, bias)
    )
    return chosen.forward(x, weight, bias) if is_served else F.linear(x, weight, bias)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(len(x), len(weight))


_LINEAR = define("linear(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor", _forward, _fake_forward)
