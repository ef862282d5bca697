"""What the CPU kernels of the scan and of its step are told alike."""

from __future__ import annotations

import ctypes
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

_MaybeTensor = TypeVar("_MaybeTensor", Tensor, "Tensor | None")


class Rows(ctypes.Structure):
    """Where a tensor's rows lie, as scan.hpp has it."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "row", "group", "number")),
    ]


def fields(rows: str = "", pointers: str = "", numbers: str = "") -> list[tuple[str, type]]:
    """Fields of a kernel's structure, in this order."""
    kinds = ((rows, Rows), (pointers, ctypes.c_void_p), (numbers, ctypes.c_int64))
    return [(name, kind) for names, kind in kinds for name in names.split()]


def in_fp32_if_half(x: _MaybeTensor) -> _MaybeTensor:
    """Kernels know no fp16."""
    return x if x is None or x.dtype != torch.float16 else x.float()


def contiguous(x: _MaybeTensor) -> _MaybeTensor:
    """As it is where it is; None stays."""
    return x if x is None else x.contiguous()
