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


class _Step(ctypes.Structure):
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
    batch, channels = u.shape
    states, device = A.shape[1], u.get_device()
    A = A.contiguous()
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    state_address, A_address = state.data_ptr(), A.data_ptr()
    slot, channel, entry = state.stride()
    B_address, B_row, B_group, B_share, B_offset = _map(B, channels)
    C_address, C_row, C_group, C_share, C_offset = _map(C, channels)
    offset = (state_address | A_address | 4 * slot | 4 * channel) % (4 * _VECTOR) | B_offset | C_offset
    width = _VECTOR if offset == 0 and entry == 1 and states % _VECTOR == 0 else 1
    lanes = lanes_of(states, width)
    rows = min(max(batch * channels * lanes // _WANTED_THREADS, 1), _MOST_ROWS)
    parameters = _Step(
        out.data_ptr(), state_address, u.data_ptr(), delta.data_ptr(), None if z is None else z.data_ptr(),
        A_address, B_address, C_address,
        None if D is None else D.contiguous().data_ptr(),
        None if delta_bias is None else delta_bias.contiguous().data_ptr(),
        None if state_indices is None else state_indices.data_ptr(),
        u.stride(0), delta.stride(0), 0 if z is None else z.stride(0), slot, channel, entry,
        B_row, B_group, C_row, C_group, 0 if state_indices is None else state_indices.stride(0),
        batch, channels, rows, B_share, C_share, state.shape[0],
        state_indices is not None and state_indices.dtype == torch.int64,
    )  # fmt: skip
    kernel = _kernel(
        u.dtype, delta.dtype, None if z is None else z.dtype, B.dtype, C.dtype, states, width,
        options.delta_softplus, options.discretization, device,
    )  # fmt: skip
    blocks = -(-channels * lanes // _THREADS) * -(-batch // rows)
    stream = torch._C._cuda_getCurrentRawStream(device)  # pyright: ignore[reportPrivateUsage]
    kernel((blocks, 1, 1), _THREADS, parameters, stream)
    return out


@functools.cache
def lanes_of(states: int, width: int) -> int:
    """Threads that share a channel, a power of two; each reads twice `width` states where a warp is enough for that.

    Example:
        >>> lanes_of(16, 4), lanes_of(16, 1), lanes_of(256, 4), lanes_of(1, 1)
        (2, 8, 32, 1)
    """
    return min(_WARP, 1 << (-(-states // (2 * width)) - 1).bit_length())


def _map(x: Tensor, channels: int) -> tuple[int, int, int, int, int]:
    """How B or C, (B, G, N) or (D, N), is read.

    Its address, its strides along rows and groups, the channels of a group, and how far off from vectors it lies.
    """
    address, size = x.data_ptr(), x.element_size()
    if x.dim() == 2:
        row, group, share = 0, x.stride(0), 1
    else:
        row, group, _ = x.stride()
        share = channels // x.shape[1]
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
) -> nvrtc.Kernel:
    defines = (
        ("U", _WORDS[u]),
        ("DELTA", _WORDS[delta]),
        ("Z", _WORDS[z or u]),
        ("B_MAP", _WORDS[B]),
        ("C_MAP", _WORDS[C]),
        ("N", states),
        ("LANES", lanes_of(states, width)),
        ("WIDTH", width),
        ("THREADS", _THREADS),
        ("HAS_Z", int(z is not None)),
        ("SOFTPLUS", int(softplus)),
        ("ZOH", int(discretization == "zoh")),
    )
    return nvrtc.kernel(_SOURCE, "selective_scan_step", defines, device)
