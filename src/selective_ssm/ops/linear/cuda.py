"""A matrix times few vectors on NVIDIA GPUs: hands the kernels of few.cu and many.cu their arguments.

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
from selective_ssm.ops.linear.plan import FEW, PLACES, Plan, plan
from selective_ssm.ops.linear.tiling import Tiling, tiling
from selective_ssm.ops.parameters import Parameters, pointer

MOST_VECTORS = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 8}
"""By dtype; where there are more torch's own products pay."""

_FOLDER = Path(__file__).parent
_SMALL = 256
"""Outputs: so few that few.cu serves any number of vectors, since tiles of many.cu would leave most of a GPU idle."""
_LARGE = 1 << 22
"""Numbers of a weight beyond which many vectors are torch's: blocks of its products share what they read alike."""
_VECTOR_BYTES = 16


class _Linear(Parameters):
    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("out", "x", "weight", "bias")),
        *((name, ctypes.c_int64) for name in ("x_row", "weight_row")),
        *((name, ctypes.c_int) for name in ("vectors", "inputs", "outputs")),
    ]


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether there are few vectors, and all of the weight lies in whole vectors of 16 bytes."""
    (vectors, inputs), outputs, dtype = x.shape, len(weight), x.dtype
    return (
        outputs > 0  # nothing is no launch
        and vectors <= MOST_VECTORS.get(dtype, 0)
        and (_is_served_by_few(vectors, outputs) or (weight.numel() <= _LARGE and _is_aligned(x)))
        and (weight.data_ptr() | inputs * dtype.itemsize | weight.stride(0) * dtype.itemsize) % _VECTOR_BYTES == 0
        and (bias is None or bias.dtype == dtype)
    )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns (M, N), of x (M, K) and weight (N, K) with unit strides in K."""
    (vectors, inputs), outputs, device = x.shape, len(weight), x.get_device()
    out = x.new_empty(vectors, outputs)
    bias = None if bias is None else bias.contiguous()
    if _is_served_by_few(vectors, outputs):
        chosen = plan(vectors, outputs, inputs, x.itemsize)
        kernel = _few(x.dtype, chosen, vectors > FEW, _is_aligned(x), device)
        blocks = (-(-outputs // chosen.rows), -(-vectors // PLACES), 1)
    else:
        chosen = tiling(vectors, outputs, inputs)
        kernel = _many(x.dtype, chosen, device)
        blocks = (-(-outputs // chosen.rows), -(-vectors // chosen.vectors), 1)
    parameters = _Linear.of(
        out.data_ptr(), x.data_ptr(), weight.data_ptr(), pointer(bias),
        x.stride(0), weight.stride(0), vectors, inputs, outputs,
    )  # fmt: skip
    kernel(blocks, chosen.threads, parameters, current_stream(device))
    return out


def _is_served_by_few(vectors: int, outputs: int) -> bool:
    return vectors <= PLACES or outputs <= _SMALL


def _is_aligned(x: Tensor) -> bool:
    """Whether every row begins on a vector's boundary."""
    return (x.data_ptr() | x.stride(0) * x.itemsize) % _VECTOR_BYTES == 0


@functools.cache
def _few(dtype: torch.dtype, chosen: Plan, is_wide: bool, is_aligned: bool, device: int) -> nvrtc.Kernel:
    defines = (
        ("NUMBER", nvrtc.NUMBER_TYPES[dtype]),
        ("TILES", chosen.tiles),
        ("AHEAD", chosen.ahead),
        ("SPLIT", chosen.split),
        ("GROUPS", chosen.groups),
        ("WIDE", int(is_wide)),
        ("ALIGNED", int(is_aligned)),
    )
    shared = 4 * chosen.split * chosen.rows * (PLACES if is_wide else FEW)
    return nvrtc.kernel(_FOLDER / "few.cu", "linear", defines, device, shared, waits=True)


@functools.cache
def _many(dtype: torch.dtype, chosen: Tiling, device: int) -> nvrtc.Kernel:
    defines = (
        ("NUMBER", nvrtc.NUMBER_TYPES[dtype]),
        ("VECTORS", chosen.vectors),
        ("ROWS", chosen.rows),
        ("DEPTH", chosen.depth),
        ("STAGES", chosen.stages),
        ("TEAMS", chosen.teams),
        ("SPLIT", chosen.split),
    )
    return nvrtc.kernel(_FOLDER / "many.cu", "linear_many", defines, device, chosen.shared, waits=True)
