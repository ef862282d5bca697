"""The add and the norm on NVIDIA GPUs: what `kernel.cu` is compiled for, and how it is launched."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from selective_ssm.ops import nvrtc
from selective_ssm.ops.driver import current_stream
from selective_ssm.ops.parameters import pointer

SOURCE = Path(__file__).parent / "kernel.cu"
MAX_THREADS = 512  # of a row; a longer one takes several turns
NARROW = 256  # columns, below which rows share a block
NARROW_THREADS = 256  # of a block that rows share
RESIDENT_THREADS = 1024  # of the backward on a multiprocessor; each of its blocks leaves a part of d weight
SUM_COLUMNS = 32  # of a block of `sum_partials`
SUM_THREADS = 256


class Shape(NamedTuple):
    """What the source is compiled for."""

    x: torch.dtype
    residual: torch.dtype
    weight: torch.dtype
    y: torch.dtype
    width: int
    vectors: bool

    @property
    def lanes(self) -> int:
        """Threads of a row, eight columns each: whole warps, or of a narrow row a power of two."""
        if self.width < NARROW:
            return 1 << (-(-self.width // 8) - 1).bit_length()
        return min(MAX_THREADS, -(-self.width // 256) * 32)

    @property
    def rows(self) -> int:
        """Rows that a block takes at once."""
        return NARROW_THREADS // self.lanes if self.width < NARROW else 1

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.lanes * self.rows

    @property
    def shared(self) -> int:
        """Bytes in which the warps of a row exchange two sums, twice over, or rows add up their parts of d weight."""
        return 4 * (self.threads // 32 * 4 if self.rows == 1 else self.rows * self.width)

    @property
    def defines(self) -> tuple[tuple[str, str | int], ...]:
        """The source's macros."""
        names = ("BRANCH", "STREAM", "WEIGHT", "OUTPUT")
        formats = ((name, nvrtc.NUMBER_TYPES[dtype]) for name, dtype in zip(names, self[:4], strict=True))
        sizes = (("WIDTH", self.width), ("LANES", self.lanes), ("ROWS", self.rows))
        flags = (("VECTORS", int(self.vectors)), ("SHARES_GRADIENT", int(self.x == self.residual)))
        return (*formats, *sizes, *flags)


class ForwardParameters(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "y", "total")),
        ("rows", ctypes.c_int64),
        ("eps", ctypes.c_float),
    ]


class BackwardParameters(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("d_y", "d_total", "total", "weight", "d_residual", "d_x", "partials")),
        ("rows", ctypes.c_int64),
        ("eps", ctypes.c_float),
    ]


class SumParameters(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = [("partials", ctypes.c_void_p), ("d_weight", ctypes.c_void_p), ("blocks", ctypes.c_int)]


def forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns y in `dtype`, and the sum in the residual's."""
    y, total = torch.empty_like(x, dtype=dtype), torch.empty_like(residual)
    shape = _shape(x.dtype, dtype, total, weight, (x, residual))
    pointers = (x.data_ptr(), residual.data_ptr(), weight.data_ptr(), y.data_ptr(), total.data_ptr())
    rows = total.numel() // shape.width
    blocks, parameters = -(-rows // shape.rows), ForwardParameters(*pointers, rows, eps)
    _launch(shape, "forward", blocks, shape.threads, shape.shared, parameters, total.get_device())
    return y, total


def backward(
    d_y: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of residual, x (None where the residual's serves) and weight."""
    shape = _shape(dtype, d_y.dtype, total, weight, (d_y, d_total))
    rows = total.numel() // shape.width
    blocks = min(-(-rows // shape.rows), RESIDENT_THREADS // shape.threads * _multiprocessors(total.get_device()))
    d_residual, d_weight = torch.empty_like(total), torch.empty_like(weight)
    d_x = None if dtype == total.dtype else torch.empty_like(total, dtype=dtype)
    partials = torch.empty(blocks, total.shape[-1], dtype=torch.float32, device=total.device)
    pointers = (pointer(one) for one in (d_y, d_total, total, weight, d_residual, d_x, partials))
    parameters = BackwardParameters(*pointers, rows, eps)
    _launch(shape, "backward", blocks, shape.threads, shape.shared, parameters, total.get_device())
    summed = SumParameters(partials.data_ptr(), d_weight.data_ptr(), blocks)
    _launch(
        shape, "sum_partials", -(-shape.width // SUM_COLUMNS), SUM_THREADS, 4 * SUM_THREADS, summed, total.get_device()
    )
    return d_residual, d_x, d_weight


def _shape(x: torch.dtype, y: torch.dtype, total: Tensor, weight: Tensor, others: tuple[Tensor | None, ...]) -> Shape:
    """What to compile for; vectors where all that is read lies on their boundaries (what we allocate does)."""
    width = total.shape[-1]
    vectors = width % 8 == 0 and all(one is None or one.data_ptr() % 16 == 0 for one in (total, weight, *others))
    return Shape(x, total.dtype, weight.dtype, y, width, vectors)


def _launch(
    shape: Shape,
    name: str,
    blocks: int,
    threads: int,
    shared: int,
    parameters: ctypes.Structure,
    device: int,
) -> None:
    stream = current_stream(device)
    _kernel(shape, name, device, shared)((blocks, 1, 1), threads, parameters, stream)


@functools.cache
def _kernel(shape: Shape, name: str, device: int, shared: int) -> nvrtc.Kernel:
    return nvrtc.kernel(SOURCE, name, shape.defines, device, shared, waits=name == "forward")


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
