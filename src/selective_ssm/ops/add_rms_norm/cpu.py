"""The add and the norm on a CPU: hands the kernels of cpu.cpp their arguments.

What is neither fp32 nor bf16 beside a residual stream that is, goes through fp32.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from selective_ssm.ops import native
from selective_ssm.ops.parameters import Parameters

ROWS = 32
"""Of a task, as in cpu.cpp; each leaves a part of d weight."""

_POINTERS = "x residual weight y total d_y d_total d_residual d_x partials d_weight"


class _Norm(Parameters):
    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("x_number", "residual_number", "y_number", "threads")),
    ]


def forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns y in `dtype`, and the sum in the residual's."""
    x, weight = _served(x), weight.float()
    y, total = torch.empty_like(x, dtype=_number(dtype)), torch.empty_like(residual)
    pointers = (x.data_ptr(), residual.data_ptr(), weight.data_ptr(), y.data_ptr(), total.data_ptr(), *[0] * 6)
    _launch("add_rms_norm", pointers, total, eps, x.dtype, y.dtype)
    return y.to(dtype), total


def backward(
    d_y: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of residual, x (None where the residual's serves) and weight."""
    d_y, wide = _served(d_y), weight.float()
    d_residual, d_weight = torch.empty_like(total), torch.empty_like(wide)
    d_x = None if dtype == total.dtype else torch.empty_like(total, dtype=_number(dtype))
    width = total.shape[-1]
    partials = d_weight.new_empty(-(-total.numel() // (width * ROWS)), width)
    tensors = (wide, None, total, d_y, d_total, d_residual, d_x, partials, d_weight)
    pointers = (0, 0, *(0 if one is None else one.data_ptr() for one in tensors))
    _launch("add_rms_norm_backward", pointers, total, eps, _number(dtype), d_y.dtype)
    return d_residual, None if d_x is None else d_x.to(dtype), d_weight.to(weight.dtype)


def _launch(name: str, pointers: tuple[int, ...], total: Tensor, eps: float, x: torch.dtype, y: torch.dtype) -> None:
    numbers = (native.NUMBERS[dtype] for dtype in (x, total.dtype, y))
    width = total.shape[-1]
    threads = native.threads(total.numel())
    parameters = _Norm.of(*pointers, total.numel() // width, width, eps, *numbers, threads)
    native.function(name)(ctypes.byref(parameters))


def _number(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels read and write in a dtype's place."""
    return dtype if dtype in native.NUMBERS else torch.float32


def _served(x: Tensor) -> Tensor:
    return x.to(_number(x.dtype))
