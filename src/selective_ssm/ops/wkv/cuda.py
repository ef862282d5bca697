"""RWKV's average on NVIDIA GPUs: what `kernel.cu` is compiled for, and how it is launched.

Legend: B batch, L length, D channels, S sequences in a pack.
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
from selective_ssm.ops.parameters import Parameters, pointer
from selective_ssm.ops.wkv.inputs import Gradients, Inputs

SOURCE = Path(__file__).parent / "kernel.cu"
STEPS = 16
"""Tokens from one kept state to the next: as many as a thread can hold in registers, and send for ahead of time."""
THREADS = 32
"""Of a block, a channel each: as few as there can be, since most often there are too few for the machine."""


def _pointers(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


_COMMON = [*_pointers("k v fade bonus state offsets kept"), ("length", ctypes.c_int64), ("wide", ctypes.c_int)]


class _Forward(Parameters):
    _fields_: ClassVar = [*_COMMON, *_pointers("y end")]


class _Backward(Parameters):
    _fields_: ClassVar = [*_COMMON, *_pointers("d_y d_end d_k d_v d_fade d_bonus d_state")]


def forward(inputs: Inputs, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns y (B, L, D), the end state (B or S, 3, D), and, to `save`, the states before every STEPS-th token."""
    y, end = torch.empty_like(inputs.k), torch.empty_like(inputs.state)
    kept = end.new_empty(saved_shape(inputs)) if save else None
    _launch("wkv", inputs, _Forward.of(*_common(inputs, kept), y.data_ptr(), end.data_ptr()))
    return y, end, kept


def saved_shape(inputs: Inputs) -> tuple[int, ...]:
    """The kept states of each row, as many as one sequence has: in a pack there is a place for each as well."""
    batch, length, channels = inputs.k.shape
    return batch, (max(length, 1) - 1) // STEPS, 3, channels


def backward(d_y: Tensor, d_end: Tensor | None, saved: Tensor, inputs: Inputs) -> Gradients:
    """The gradients of k, v, fade, bonus and state."""
    d_k, d_v, d_state = (torch.empty_like(x) for x in (inputs.k, inputs.v, inputs.state))
    d_fade, d_bonus = (torch.empty_like(d_state[:, 0]) for _ in range(2))  # each sequence's part
    results = (pointer(x) for x in (d_y, d_end, d_k, d_v, d_fade, d_bonus, d_state))
    _launch("wkv_backward", inputs, _Backward.of(*_common(inputs, saved), *results))
    return d_k, d_v, d_fade.sum(0), d_bonus.sum(0), d_state


def _common(inputs: Inputs, kept: Tensor | None) -> tuple[int, ...]:
    offsets = inputs.cu_seqlens
    pointers = map(pointer, (*inputs, kept))
    return *pointers, inputs.k.shape[1], offsets is not None and offsets.dtype == torch.int64


def _launch(name: str, inputs: Inputs, parameters: ctypes.Structure) -> None:
    (sequences, _, width), device = inputs.state.shape, inputs.k.get_device()
    kernel = _kernel(name, inputs.k.dtype, width, device)
    kernel((-(-width // THREADS) * sequences, 1, 1), THREADS, parameters, current_stream(device))


@functools.cache
def _kernel(name: str, number: torch.dtype, width: int, device: int) -> nvrtc.Kernel:
    defines = (("NUMBER", nvrtc.NUMBER_TYPES[number]), ("WIDTH", width), ("STEPS", STEPS), ("THREADS", THREADS))
    return nvrtc.kernel(SOURCE, name, defines, device)
