"""What a kernel is launched with, as its C structure and quickly made."""

from __future__ import annotations

import ctypes
import struct
from typing import Any, ClassVar

from torch import Tensor

_LETTERS: dict[Any, str] = {ctypes.c_void_p: "P", ctypes.c_int64: "q", ctypes.c_int: "i", ctypes.c_float: "f"}


class Parameters(ctypes.Structure):
    """A kernel's one argument: pointers, sizes and numbers, and structures of such.

    Example:
        >>> class Copy(Parameters):
        ...     _fields_ = [("source", ctypes.c_void_p), ("size", ctypes.c_int64), ("wide", ctypes.c_int)]
        >>> ctypes.sizeof(Copy), Copy.of(0, 12, True).size
        (24, 12)
    """

    _layout: ClassVar[struct.Struct]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._layout = struct.Struct(_letters(cls.__dict__["_fields_"]) + "0P")  # padded at the end, as in C

    @classmethod
    def of(cls, *values: int | float) -> Any:
        """Every field, those of structures within one after the other; a third of the time that a call of it takes."""
        return cls.from_buffer_copy(cls._layout.pack(*values))


def pointer(x: Tensor | None) -> int:
    """A tensor's address, 0 for None."""
    return 0 if x is None else x.data_ptr()


def _letters(fields: list[tuple[str, Any]]) -> str:
    return "".join(_LETTERS.get(kind) or _letters(kind._fields_) for _, kind in fields)
