"""A matrix times few vectors on a CPU: hands the kernel of cpu.cpp its arguments.

Legend: M vectors, K inputs, N outputs.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from selective_ssm.ops import native
from selective_ssm.ops.parameters import Parameters, pointer

MOST_VECTORS = 8
"""As in cpu.cpp."""
BLOCK = 16
"""Rows that a task has at least, as in cpu.cpp: threads then seldom write to the same line of the cache."""
LEAST_FOR_THREADS = 1 << 16
"""Numbers of the weight below which more threads do not pay."""
TASK_BYTES = 1 << 20
"""Of the weight; what one thread is late by at most."""


class _Linear(Parameters):
    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("out", "x", "weight", "bias", "wide")),
        *((name, ctypes.c_int64) for name in ("x_row", "weight_row", "vectors", "inputs", "outputs", "task_rows")),
        *((name, ctypes.c_int64) for name in ("number", "threads")),
    ]


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether there are few vectors, and the bias has a dtype that can be widened."""
    return x.numel() <= MOST_VECTORS * x.shape[-1] and (bias is None or bias.dtype in native.NUMBERS)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns (M, N), of x (M, K) with M up to 8 and weight (N, K), in one dtype and with unit strides in K."""
    (vectors, inputs), outputs = x.shape, len(weight)
    out = x.new_empty(vectors, outputs)
    wide = None if x.dtype == torch.float32 else x.new_empty(vectors, inputs, dtype=torch.float32)
    bias = None if bias is None else bias.float().contiguous()
    threads = torch.get_num_threads() if weight.numel() >= LEAST_FOR_THREADS else 1
    parameters = _Linear.of(
        out.data_ptr(), x.data_ptr(), weight.data_ptr(), pointer(bias), pointer(wide),
        x.stride(0), weight.stride(0), vectors, inputs, outputs, _task_rows(weight, threads),
        native.NUMBERS[x.dtype], threads,
    )  # fmt: skip
    native.function("linear")(ctypes.byref(parameters))
    return out


def _task_rows(weight: Tensor, threads: int) -> int:
    """Some tasks for each thread, and none too large; rows are independent, so that this changes no bit."""
    outputs, inputs = weight.shape
    rows = min(outputs // (4 * threads), TASK_BYTES // (inputs * weight.itemsize))
    return max(1, rows // BLOCK) * BLOCK
