"""Checks at an operator's public door: each failure is one sentence that says what came and what was expected."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

LOW_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
_FEW = 64  # numbers that Python looks at in less time than torch is called
INDEX_DTYPES = (torch.int32, torch.int64)


Sizes = Sequence[int | None]
"""Of each axis; None for one that may have any."""


def tensor(
    name: str, x: Tensor, legend: Sequence[str], sizes: Sizes, dtypes: Iterable[torch.dtype], where: torch.device
) -> None:
    """Compares a tensor with what is expected: axes, called as in a legend such as "BLD", dtype and device."""
    if x.shape == sizes and x.dtype in dtypes and x.device == where:  # words only where something is wrong
        return
    shape(name, x, legend, sizes)
    dtype(name, x, dtypes)
    device(name, x, where)


def sizes_of(x: Tensor, axes: int) -> Sizes:
    """The sizes of a tensor of so many axes, for a legend whose letters it is the first to have."""
    return x.shape if x.dim() == axes else (None,) * axes


def shape(name: str, x: Tensor, legend: Sequence[str], sizes: Sizes) -> None:
    """Compares a shape with the sizes of a legend's letters."""
    if x.dim() == len(sizes) and all(size in (None, n) for size, n in zip(sizes, x.shape, strict=True)):
        return
    known = ", ".join(f"{k} = {size}" for k, size in zip(legend, sizes, strict=True) if size is not None)
    expected = f"({', '.join(legend)})" + (f" with {known}" if known else "")
    raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {expected}")


def dtype(name: str, x: Tensor, allowed: Iterable[torch.dtype]) -> None:
    """Compares a dtype with those that are accepted."""
    if x.dtype not in allowed:
        raise TypeError(f"{name} has dtype {_short(x.dtype)}; expected {' or '.join(map(_short, allowed))}")


def differentiated_once(what: str) -> None:
    """In a backward pass by hand: no derivative of it is asked for, as `create_graph` would.

    Raises:
        RuntimeError: one is.
    """
    if torch.is_grad_enabled():
        refuse_twice(what)


def refuse_twice(what: str) -> NoReturn:
    """Of a backward pass by hand there is no derivative."""
    raise RuntimeError(f"{what} cannot be differentiated twice: its backward is a closed form of its own")


def device(name: str, x: Tensor, expected: torch.device) -> None:
    """Compares a device with the sequence's."""
    if x.device != expected:
        raise ValueError(f"{name} is on {x.device}, the sequence on {expected}; move one to the other")


def channel_last(name: str, x: Tensor) -> None:
    """Asks for a unit stride in the last axis, which kernels read as it lies in memory."""
    if x.stride()[-1] != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} has stride {x.stride(-1)} along its last axis; expected 1: call .contiguous() first")


def choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Compares an option with those there are."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected {' or '.join(map(repr, allowed))}")


def cu_seqlens(offsets: Tensor, batch: int, length: int) -> None:
    """`offsets` must hold S + 1 non-decreasing positions from 0 to L of a single row."""
    dtype("cu_seqlens", offsets, INDEX_DTYPES)
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"cu_seqlens has shape {tuple(offsets.shape)}; expected (S + 1,) for S >= 1 packed sequences")
    if batch != 1:
        raise ValueError(f"packed sequences lie in one row, but the batch is {batch}; expected 1 with cu_seqlens")
    if not _values_can_be_read(offsets):
        return
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != length or any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(f"cu_seqlens is {_head(values)}; expected non-decreasing values from 0 to L = {length}")


def state_indices(indices: Tensor, batch: int, slots: int) -> None:
    """`indices` must name a different slot for each row; a negative one marks padding."""
    dtype("state_indices", indices, INDEX_DTYPES)
    if indices.shape != (batch,):
        raise ValueError(f"state_indices has shape {tuple(indices.shape)}; expected (B,) = ({batch},)")
    _unlike_slots(indices, slots)


def slots(indices: Tensor, state: Tensor) -> None:
    """The values alone of `state_indices`, of which the rest can be checked once for many steps."""
    if indices.dim() == 1 and state.dim() > 0:
        _unlike_slots(indices, state.shape[0])


def _unlike_slots(indices: Tensor, slots: int) -> None:
    if not _values_can_be_read(indices):
        return
    used = [i for i in indices.tolist() if i >= 0]
    if used and max(used) >= slots:
        raise ValueError(f"state_indices names slot {max(used)}, but the state has {slots}; expected 0 ... {slots - 1}")
    if len(set(used)) < len(used):
        raise ValueError(f"state_indices is {_head(indices.tolist())}; expected a different slot for each row")


def autocast(inputs: Any, names: Collection[str]) -> Any:
    """A NamedTuple of tensors, the sequence first, those named cast to the autocast dtype where autocast is on.

    They are what may be in low precision; what is complex or wide stays as it is.
    """
    sequence: Tensor = inputs[0]
    if sequence.dtype == torch.float64 or sequence.is_meta or not torch.is_autocast_enabled(device_type(sequence)):
        return inputs
    low = torch.get_autocast_dtype(device_type(sequence))
    return type(inputs)(
        *(
            x.to(low) if name in names and x is not None and x.dtype in LOW_AND_SINGLE else x
            for name, x in zip(inputs._fields, inputs, strict=True)
        )
    )


def device_type(x: Tensor) -> str:
    """As `x.device.type`, which makes a string anew each time."""
    return "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type


def out_of_range(indices: Tensor, size: int) -> int | None:
    """One of the indices that is not in 0 ... size - 1; None where all are, or where their values cannot be read."""
    if not _values_can_be_read(indices):
        return None
    some = indices.flatten().tolist() if indices.numel() <= _FEW else (int(indices.min()), int(indices.max()))
    return next((one for one in some if not 0 <= one < size), None)


def largest(x: Tensor) -> int | None:
    """The largest of some whole numbers; None where there are none, or where their values cannot be read."""
    return int(x.max()) if _values_can_be_read(x) else None


def _values_can_be_read(x: Tensor) -> bool:
    """Whether there are values to check without making the host wait or breaking a graph that is being recorded."""
    if torch.compiler.is_compiling() or x.is_meta or type(x) is not Tensor or x.numel() == 0:
        return False
    return x.is_cpu or os.environ.get("SELECTIVE_SSM_CHECK") == "1"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _head(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"
