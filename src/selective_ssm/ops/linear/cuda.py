"""A matrix times few vectors on NVIDIA GPUs: hands the kernel of kernel.cu its arguments.

Legend: M vectors, K inputs, N outputs.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from selective_ssm.ops import nvrtc
from selective_ssm.ops.driver import current_stream
from selective_ssm.ops.linear.plan import Plan, plan
from selective_ssm.ops.parameters import Parameters, pointer

MOST_VECTORS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 8}
"""By dtype; where there are more torch's own products pay."""

_SOURCE = Path(__file__).parent / "kernel.cu"
_FEW = 8
"""Vectors for which half of the places that a product of matrices has serve."""
_VECTOR_BYTES = 16


class _Linear(Parameters):
    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("out", "x", "weight", "bias")),
        *((name, ctypes.c_int64) for name in ("x_row", "weight_row")),
        *((name, ctypes.c_int) for name in ("vectors", "inputs", "outputs")),
    ]


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether there are few vectors, and all of the weight lies in whole vectors of 16 bytes."""
    inputs, dtype = x.shape[-1], x.dtype
    return (
        x.numel() <= MOST_VECTORS.get(dtype, 0) * inputs
        and (weight.data_ptr() | inputs * dtype.itemsize | weight.stride(0) * dtype.itemsize) % _VECTOR_BYTES == 0
        and (bias is None or bias.dtype == dtype)
    )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns (M, N), of x (M, K) and weight (N, K) with unit strides in K."""
    (vectors, inputs), outputs, address, row = x.shape, len(weight), x.data_ptr(), x.stride(0)
    out = x.new_empty(vectors, outputs)
    chosen = plan(outputs, inputs, x.itemsize)
    is_aligned = (address | row * x.itemsize) % _VECTOR_BYTES == 0
    kernel = _kernel(x.dtype, chosen, vectors > _FEW, is_aligned, x.get_device())
    bias = None if bias is None else bias.contiguous()
    parameters = _Linear.of(
        out.data_ptr(), address, weight.data_ptr(), pointer(bias), row, weight.stride(0), vectors, inputs, outputs
    )
    stream = current_stream(x.get_device())
    kernel((-(-outputs // chosen.rows), 1, 1), chosen.threads, parameters, stream)
    return out


@functools.cache
def _kernel(dtype: torch.dtype, chosen: Plan, is_wide: bool, is_aligned: bool, device: int) -> nvrtc.Kernel:
    defines = (
        ("NUMBER", nvrtc.NUMBER_TYPES[dtype]),
        ("TILES", chosen.tiles),
        ("AHEAD", chosen.ahead),
        ("SPLIT", chosen.split),
        ("GROUPS", chosen.groups),
        ("WIDE", int(is_wide)),
        ("ALIGNED", int(is_aligned)),
    )
    shared = 4 * chosen.split * chosen.rows * (2 * _FEW if is_wide else _FEW)
    return nvrtc.kernel(_SOURCE, "linear", defines, device, shared, waits=True)
