"""One token of the selective scan on NVIDIA GPUs: hands the kernel of step.cu its arguments.

Legend: B batch, D channels in G groups, N state.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from selective_ssm.ops import nvrtc
from selective_ssm.ops.parameters import Parameters
from selective_ssm.ops.selective_scan.inputs import Options, StepInputs

_SOURCE = Path(__file__).parent / "step.cu"
_WORDS = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
_THREADS = 128
_WARP = 32
_VECTOR = 4
"""States that a thread reads at a time, where all that holds states is aligned to as many."""
_MOST_ROWS = 4
"""Of a thread; its channel's rates then stay near."""
_WANTED_THREADS = 2**19  # a few times what the largest GPUs hold at once


class _Step(Parameters):
    _fields_ = [
        (name, kind)
        for kind, names in (
            (ctypes.c_void_p, "out state u delta z A B C D delta_bias slots"),
            (ctypes.c_int64, "u_row delta_row z_row state_slot state_channel state_entry"),
            (ctypes.c_int64, "B_row B_group C_row C_group slots_row"),
            (ctypes.c_int, "batch channels rows B_share C_share slot_count wide"),
        )
        for name in names.split()
    ]


def step(state: Tensor, inputs: StepInputs, options: Options, state_indices: Tensor | None) -> Tensor:
    """One token: updates `state` (slots, D, N) in place and returns out (B, D)."""
    u, delta, A, B, C, D, z, delta_bias = inputs
    softplus, _, discretization = options
    (batch, channels), (_, states), device = u.shape, A.shape, u.get_device()
    A, D = A.contiguous(), None if D is None else D.contiguous()
    delta_bias = None if delta_bias is None else delta_bias.contiguous()
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    z_address, z_row, z_dtype = (0, 0, None) if z is None else (z.data_ptr(), z.stride()[0], z.dtype)
    slots, slots_row, wide = 0, 0, False
    if state_indices is not None:
        slots, (slots_row,), wide = state_indices.data_ptr(), state_indices.stride(), state_indices.dtype == torch.int64
    state_address, A_address = state.data_ptr(), A.data_ptr()
    slot, channel, entry = state.stride()
    B_address, B_row, B_group, B_share, B_offset = _map(B, batch, channels)
    C_address, C_row, C_group, C_share, C_offset = _map(C, batch, channels)
    offset = (state_address | A_address | 4 * slot | 4 * channel) % (4 * _VECTOR) | B_offset | C_offset
    width = _VECTOR if offset == 0 and entry == 1 and states % _VECTOR == 0 else 1
    kernel, lanes = _kernel(
        u.dtype, delta.dtype, z_dtype, B.dtype, C.dtype, states, width, softplus, discretization, device
    )
    rows = min(max(batch * channels * lanes // _WANTED_THREADS, 1), _MOST_ROWS)
    parameters = _Step.of(
        out.data_ptr(), state_address, u.data_ptr(), delta.data_ptr(), z_address, A_address, B_address, C_address,
        0 if D is None else D.data_ptr(), 0 if delta_bias is None else delta_bias.data_ptr(), slots,
        u.stride()[0], delta.stride()[0], z_row, slot, channel, entry, B_row, B_group, C_row, C_group, slots_row,
        batch, channels, rows, B_share, C_share, state.shape[0], wide,
    )  # fmt: skip
    blocks = -(-channels * lanes // _THREADS) * -(-batch // rows)
    stream = torch._C._cuda_getCurrentRawStream(device)  # pyright: ignore[reportPrivateUsage]
    kernel((blocks, 1, 1), _THREADS, parameters, stream)
    return out


def lanes_of(states: int, width: int) -> int:
    """Threads that share a channel, a power of two; each reads twice `width` states where a warp is enough for that.

    Example:
        >>> lanes_of(16, 4), lanes_of(16, 1), lanes_of(256, 4), lanes_of(1, 1)
        (2, 8, 32, 1)
    """
    return min(_WARP, 1 << (-(-states // (2 * width)) - 1).bit_length())


def _map(x: Tensor, batch: int, channels: int) -> tuple[int, int, int, int, int]:
    """How B or C is read; see `StepInputs`.

    Its address, its strides along rows and groups, the channels of a group, and how far off from vectors it lies.
    """
    address, shape, strides = x.data_ptr(), x.shape, x.stride()
    if len(shape) == 3:
        row, group, share = strides[0], strides[1], channels // shape[1]
    elif shape[0] == batch:
        row, group, share = strides[0], 0, channels
    else:
        row, group, share = 0, strides[0], 1
    size = x.itemsize
    return address, row, group, share, (address | row * size | group * size) % (_VECTOR * size)


@functools.cache
def _kernel(
    u: torch.dtype,
    delta: torch.dtype,
    z: torch.dtype | None,
    B: torch.dtype,
    C: torch.dtype,
    states: int,
    width: int,
    softplus: bool,
    discretization: str,
    device: int,
) -> tuple[nvrtc.Kernel, int]:
    """The kernel, and the threads of a channel."""
    lanes = lanes_of(states, width)
    defines = (
        ("U", _WORDS[u]),
        ("DELTA", _WORDS[delta]),
        ("Z", _WORDS[z or u]),
        ("B_MAP", _WORDS[B]),
        ("C_MAP", _WORDS[C]),
        ("N", states),
        ("LANES", lanes),
        ("WIDTH", width),
        ("THREADS", _THREADS),
        ("HAS_Z", int(z is not None)),
        ("SOFTPLUS", int(softplus)),
        ("ZOH", int(discretization == "zoh")),
    )
    return nvrtc.kernel(_SOURCE, "selective_scan_step", defines, device), lanes
