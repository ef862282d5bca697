"""One token of the selective scan on NVIDIA GPUs: hands the kernel of step.cu its arguments.

Legend: B batch, D channels in G groups, N state.
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
from selective_ssm.ops.layouts import Layout, Layouts, layouts_of
from selective_ssm.ops.parameters import Parameters
from selective_ssm.ops.selective_scan.inputs import Options, StepInputs

_SOURCE = Path(__file__).parent / "step.cu"
_THREADS = 128
_WARP = 32
_VECTOR = 4
"""States that a thread reads at a time, where all that holds states is aligned to as many."""
_MANY_THREADS = 2**17
"""About half of what the largest GPUs hold at once."""


class _Step(Parameters):
    _fields_: ClassVar = [
        (name, kind)
        for kind, names in (
            (ctypes.c_void_p, "out state u delta z A B C D delta_bias slots"),
            (ctypes.c_int64, "u_row delta_row z_row state_slot state_channel state_entry"),
            (ctypes.c_int64, "B_row B_group C_row C_group slots_row"),
            (ctypes.c_int, "batch channels B_share C_share slot_count wide"),
        )
        for name in names.split()
    ]


def step(
    state: Tensor,
    inputs: StepInputs,
    options: Options,
    state_indices: Tensor | None,
    layouts: Layouts | None = None,
) -> Tensor:
    """One token: updates `state` (slots, D, N) in place and returns out (B, D)."""
    u, delta, A, B, C, D, z, delta_bias = inputs
    softplus, _, discretization = options
    if layouts is None:
        layouts = layouts_of(state, *inputs, state_indices)
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    A, D = A.contiguous(), None if D is None else D.contiguous()
    delta_bias = None if delta_bias is None else delta_bias.contiguous()
    rates, state_address, B_address, C_address = A.data_ptr(), state.data_ptr(), B.data_ptr(), C.data_ptr()
    offsets = (rates | state_address) % 16, B_address % 16, C_address % 16
    kernel, blocks, device, sizes = _prepared(layouts, softplus, discretization, *offsets)
    parameters = _Step.of(
        out.data_ptr(), state_address, u.data_ptr(), delta.data_ptr(), 0 if z is None else z.data_ptr(),
        rates, B_address, C_address, 0 if D is None else D.data_ptr(),
        0 if delta_bias is None else delta_bias.data_ptr(), 0 if state_indices is None else state_indices.data_ptr(),
        *sizes,
    )  # fmt: skip
    stream = current_stream(device)
    kernel((blocks, 1, 1), _THREADS, parameters, stream)
    return out


def lanes_of(states: int, width: int, channels: int) -> int:
    """Threads that share a channel, a power of two; each reads `width` states once or, of many channels, twice.

    What all lanes of a channel work out alike then costs half as much. A warp is the most.

    Example:
        >>> lanes_of(16, 4, 1536), lanes_of(16, 4, 128 * 1536), lanes_of(256, 4, 1), lanes_of(1, 1, 1)
        (4, 2, 32, 1)
    """
    at_once = _power_of_two(-(-states // width))
    return min(_WARP, at_once if at_once * channels <= _MANY_THREADS else _power_of_two(-(-at_once // 2)))


@functools.lru_cache(1024)
def _prepared(
    layouts: Layouts,
    softplus: bool,
    discretization: str,
    state_offset: int,
    B_offset: int,
    C_offset: int,
) -> tuple[nvrtc.Kernel, int, int, tuple[int, ...]]:
    """What a step takes but for its addresses: the kernel, its blocks, its device, and what is no pointer in `_Step`.

    The offsets are of addresses from multiples of 16 bytes, those of the state and of A in one.
    """
    state, u, delta, A, B, C, _, z, _, slots = layouts
    (batch, channels), u_strides, u_dtype, device = u
    _, states = A[0]
    slot, channel, entry = state[1]
    B_row, B_group, B_share = _strides(B, batch, channels)
    C_row, C_group, C_share = _strides(C, batch, channels)
    aligned = (
        (state_offset | 4 * slot | 4 * channel) % (4 * _VECTOR) == 0
        and (B_offset | (B_row | B_group) * B[2].itemsize) % (_VECTOR * B[2].itemsize) == 0
        and (C_offset | (C_row | C_group) * C[2].itemsize) % (_VECTOR * C[2].itemsize) == 0
    )
    width = _VECTOR if aligned and entry == 1 and states % _VECTOR == 0 else 1
    lanes = lanes_of(states, width, batch * channels)
    sizes = (
        u_strides[0], delta[1][0], z[1][0] if z else 0, slot, channel, entry,
        B_row, B_group, C_row, C_group, slots[1][0] if slots else 0,
        batch, channels, B_share, C_share, state[0][0], bool(slots and slots[2] == torch.int64),
    )  # fmt: skip
    defines = (
        ("U", nvrtc.NUMBER_TYPES[u_dtype]),
        ("DELTA", nvrtc.NUMBER_TYPES[delta[2]]),
        ("Z", nvrtc.NUMBER_TYPES[z[2] if z else u_dtype]),
        ("B_MAP", nvrtc.NUMBER_TYPES[B[2]]),
        ("C_MAP", nvrtc.NUMBER_TYPES[C[2]]),
        ("N", states),
        ("LANES", lanes),
        ("WIDTH", width),
        ("THREADS", _THREADS),
        ("HAS_Z", int(z is not None)),
        ("SOFTPLUS", int(softplus)),
        ("ZOH", int(discretization == "zoh")),
    )
    kernel = nvrtc.kernel(_SOURCE, "selective_scan_step", defines, device.index, waits=True)
    return kernel, -(-channels * lanes // _THREADS) * batch, device.index, sizes


def _power_of_two(least: int) -> int:
    """The smallest that is at least so much."""
    return 1 << max(least - 1, 0).bit_length()


def _strides(x: Layout, batch: int, channels: int) -> tuple[int, int, int]:
    """How B or C is read (see `StepInputs`): its strides along rows and groups, and the channels of a group."""
    shape, strides, *_ = x
    if len(shape) == 3:
        return strides[0], strides[1], channels // shape[1]
    if shape[0] == batch:
        return strides[0], 0, channels
    return 0, strides[0], 1
