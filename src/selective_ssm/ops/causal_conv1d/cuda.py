"""The causal convolution on NVIDIA GPUs: hands the kernels of kernel.cu and step.cu their arguments.

Legend: B batch, L length, D channels, K width, S sequences in a row. Strides are in bytes, but for those of a step.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from selective_ssm.ops import nvrtc
from selective_ssm.ops.causal_conv1d.inputs import Inputs, Options, StepInputs
from selective_ssm.ops.causal_conv1d.plan import THREADS, Plan, plan
from selective_ssm.ops.driver import current_stream
from selective_ssm.ops.layouts import Layouts, layouts_of
from selective_ssm.ops.parameters import Parameters, pointer

_FOLDER = Path(__file__).parent
SUM_THREADS = 256
"""Threads of a block that sums what others have left, for 32 sums."""
STEP_THREADS = 128
"""Threads of a block of a step."""
STEP_CHANNELS = 8
"""Of such a thread, where it can read vectors and there is work for all multiprocessors nevertheless."""
LEAST_FOR_VECTORS = 1 << 16
"""Channels of all rows together, from which there is."""


def _fields(pointers: str, sizes: str = "", numbers: str = "") -> list[tuple[str, type]]:
    kinds = ((pointers, ctypes.c_void_p), (sizes, ctypes.c_int64), (numbers, ctypes.c_int))
    return [(name, kind) for names, kind in kinds for name in names.split()]


_COMMON = _fields(
    pointers="x weight bias state offsets",
    sizes="x_batch x_token state_row state_channel state_entry length",
    numbers="sequences channels lanes run columns tiles wide reverse",
)


class _Forward(Parameters):
    _fields_: ClassVar = [*_COMMON, *_fields(pointers="out final_state", sizes="out_batch out_token")]


class _Backward(Parameters):
    _fields_: ClassVar = [
        *_COMMON,
        *_fields(
            pointers="d_out d_final d_x d_state partials",
            sizes="d_out_batch d_out_token d_final_row d_final_channel d_final_entry d_x_batch d_x_token",
        ),
    ]


class _Sum(Parameters):
    _fields_: ClassVar = _fields(pointers="partials d_weight d_bias", numbers="groups columns lanes channels")


class _Step(Parameters):
    _fields_: ClassVar = _fields(
        pointers="out state x weight bias slots",
        sizes="x_row state_slot state_channel state_entry weight_channel weight_tap bias_channel slots_row",
        numbers="channels slot_count wide",
    )


class _Kind(NamedTuple):
    """What the kernels are compiled for."""

    x: torch.dtype
    weight: torch.dtype
    bias: torch.dtype | None
    state: torch.dtype | None
    width: int
    activation: str | None

    @property
    def defines(self) -> tuple[tuple[str, str | int], ...]:
        return (
            ("X_TYPE", nvrtc.NUMBER_TYPES[self.x]),
            ("WEIGHT_TYPE", nvrtc.NUMBER_TYPES[self.weight]),
            ("BIAS_TYPE", nvrtc.NUMBER_TYPES[self.bias or self.weight]),
            ("STATE_TYPE", nvrtc.NUMBER_TYPES[self.state or self.x]),
            ("WIDTH", self.width),
            ("SILU", int(self.activation == "silu")),
        )


@functools.cache
def _kernel(name: str, kind: _Kind, channels: int, unroll: int, min_blocks: int, device: int) -> nvrtc.Kernel:
    floats = {
        "causal_conv1d": 0,
        "causal_conv1d_backward": THREADS * channels * (kind.width + 1),
        "causal_conv1d_sum": SUM_THREADS,
    }
    defines = (
        *kind.defines,
        ("BACKWARD", int(name != "causal_conv1d")),
        ("THREADS", THREADS),
        ("CHANNELS", channels),
        ("UNROLL", unroll),
        ("MIN_BLOCKS", min_blocks),
    )
    return nvrtc.kernel(_FOLDER / "kernel.cu", name, defines, device, shared=4 * floats[name])


@functools.lru_cache(1024)
def _prepared(layouts: Layouts, activation: str | None, offset: int) -> tuple[nvrtc.Kernel, int, int, tuple[int, ...]]:
    """What a step takes but for its addresses: the kernel, its blocks, its device, what is no pointer in `_Step`.

    The offset is that of its addresses from multiples of 16 bytes, all in one.
    """
    state, x, weight, bias, slots = layouts
    (batch, channels), x_strides, dtype, device = x
    kind = _Kind(dtype, weight[2], bias[2] if bias else None, state[2], weight[0][1], activation)
    is_large = batch * channels >= LEAST_FOR_VECTORS
    at_once = STEP_CHANNELS if is_large and offset == 0 and _are_vectors(layouts, kind) else 1
    defines = (*kind.defines, ("THREADS", STEP_THREADS), ("CHANNELS", at_once))
    kernel = nvrtc.kernel(_FOLDER / "step.cu", "causal_conv1d_step", defines, device.index, waits=True)
    sizes = (
        x_strides[0], *state[1], *weight[1], bias[1][0] if bias else 0, slots[1][0] if slots else 0,
        channels, state[0][0], bool(slots and slots[2] == torch.int64),
    )  # fmt: skip
    return kernel, batch * -(-channels // (STEP_THREADS * at_once)), device.index, sizes


def _are_vectors(layouts: Layouts, kind: _Kind) -> bool:
    """Whether what a thread of a step reads of each tensor is one piece of memory, and begins where a vector does."""
    state, x, weight, bias, _ = layouts
    slot, channel, entry = state[1]
    history = kind.width - 1
    return (
        x[0][1] % STEP_CHANNELS == 0
        and x[1][0] * x[2].itemsize % 16 == 0
        and slot * state[2].itemsize % 16 == 0
        and (history == 0 or channel == history)
        and (history < 2 or entry == 1)
        and weight[1] == (kind.width, 1)
        and (not bias or bias[1][0] == 1)
    )


class _Rows(NamedTuple):
    """How the kernels walk over the tokens of a (B, L, D) tensor."""

    first: int  # address of the token that is visited first
    batch: int
    token: int

    @classmethod
    def of(cls, x: Tensor, reverse: bool) -> _Rows:
        address, size = x.data_ptr(), x.element_size()
        batch, token, _ = x.stride()
        if reverse:
            return cls(address + (x.shape[1] - 1) * token * size, batch * size, -token * size)
        return cls(address, batch * size, token * size)


class _Call(NamedTuple):
    """What both passes hand to their kernels."""

    kind: _Kind
    plan: Plan
    common: tuple[int, ...]  # the arguments of _COMMON

    @classmethod
    def of(cls, inputs: Inputs, options: Options, sequences: int, backward: bool, *rows: _Rows) -> _Call:
        """`rows` are those of x and of every other (B, L, D) tensor."""
        x, weight, bias, state, offsets = inputs
        batch, length, channels = x.shape
        _, width = weight.shape
        misaligned = weight.data_ptr() | (0 if bias is None else bias.data_ptr())
        for row in rows:
            misaligned |= row.first | row.batch | row.token
        chosen = plan(batch, length, channels, width, x.element_size(), misaligned % 16 == 0, backward)
        common = (
            rows[0].first, weight.data_ptr(), pointer(bias), pointer(state), pointer(offsets),
            rows[0].batch, rows[0].token, *_strides(state), length,
            sequences, channels, chosen.lanes, chosen.run, chosen.columns, chosen.tiles,
            offsets is not None and offsets.dtype == torch.int64, options.reverse,
        )  # fmt: skip
        dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype, None if state is None else state.dtype)
        return cls(_Kind(*dtypes, width, options.activation), chosen, common)

    def launch(self, name: str, blocks: int, parameters: ctypes.Structure, device: int, threads: int = THREADS) -> None:
        channels, unroll, min_blocks, *_ = self.plan
        kernel = _kernel(name, self.kind, channels, unroll, min_blocks, device)
        stream = current_stream(device)
        kernel((blocks, 1, 1), threads, parameters, stream)


def forward(inputs: Inputs, options: Options, save: bool) -> tuple[Tensor, Tensor, None]:
    """Returns out (B, L, D) and the final state (B or S, D, K - 1); `backward` needs nothing but the inputs."""
    inputs = _contiguous(inputs)
    x, (channels, width) = inputs.x, inputs.weight.shape
    sequences = _count_sequences(inputs)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    final = x.new_empty((x.shape[0] * sequences, channels, width - 1))
    x_rows, out_rows = _Rows.of(x, options.reverse), _Rows.of(out, options.reverse)
    call = _Call.of(inputs, options, sequences, False, x_rows, out_rows)
    blocks = call.plan.columns * call.plan.tiles * x.shape[0]
    parameters = _Forward.of(*call.common, out_rows.first, final.data_ptr(), out_rows.batch, out_rows.token)
    call.launch("causal_conv1d", blocks, parameters, x.get_device())
    return out, final, None


def saved_shape(inputs: Inputs) -> tuple[int, ...]:
    """Nothing is kept."""
    return (0,)


def backward(
    d_out: Tensor, d_final: Tensor | None, saved: Tensor, inputs: Inputs, options: Options
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and initial_state, in their dtypes; None where there is no input."""
    inputs = _contiguous(inputs)
    x, weight, bias, state, _ = inputs
    channels, width = weight.shape
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    d_weight = torch.empty_like(weight)
    d_bias = None if bias is None else torch.empty_like(bias)
    d_state = None if state is None else state.new_empty(state.shape)
    x_rows, d_out_rows, d_x_rows = (_Rows.of(one, options.reverse) for one in (x, d_out, d_x))
    call = _Call.of(inputs, options, _count_sequences(inputs), True, x_rows, d_out_rows, d_x_rows)

    own, _, _, lanes, _, columns, tiles = call.plan
    groups, device = tiles * x.shape[0], x.get_device()
    part = lanes * own * (width + 1)  # what a block leaves of the gradients of weight and bias
    partials = torch.empty(groups * columns * part, dtype=torch.float32, device=x.device)
    parameters = _Backward.of(
        *call.common,
        d_out_rows.first, pointer(d_final), d_x_rows.first, pointer(d_state), partials.data_ptr(),
        d_out_rows.batch, d_out_rows.token, *_strides(d_final), d_x_rows.batch, d_x_rows.token,
    )  # fmt: skip
    call.launch("causal_conv1d_backward", groups * columns, parameters, device)
    summed = _Sum.of(partials.data_ptr(), d_weight.data_ptr(), pointer(d_bias), groups, columns, lanes, channels)
    call.launch("causal_conv1d_sum", -(-columns * part // 32), summed, device, SUM_THREADS)
    return d_x, d_weight, d_bias, d_state


def step(
    state: Tensor,
    inputs: StepInputs,
    options: Options,
    state_indices: Tensor | None,
    layouts: Layouts | None = None,
) -> Tensor:
    """One token: updates `state` (slots, D, K - 1) in place and returns out (B, D)."""
    x, weight, bias = inputs
    if layouts is None:
        layouts = layouts_of(state, *inputs, state_indices)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    own = (state.data_ptr(), x.data_ptr(), weight.data_ptr(), pointer(bias))
    offset = (own[0] | own[1] | own[2] | own[3]) % 16
    kernel, blocks, device, sizes = _prepared(layouts, options.activation, offset)
    parameters = _Step.of(out.data_ptr(), *own, pointer(state_indices), *sizes)
    stream = current_stream(device)
    kernel((blocks, 1, 1), STEP_THREADS, parameters, stream)
    return out


def _contiguous(inputs: Inputs) -> Inputs:
    """With the small tensors laid out as the kernels read them."""
    _, weight, bias, _, offsets = inputs
    return inputs._replace(
        weight=weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        cu_seqlens=None if offsets is None else offsets.contiguous(),
    )


def _count_sequences(inputs: Inputs) -> int:
    """Of each row."""
    return 1 if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1


def _strides(states: Tensor | None) -> tuple[int, ...]:
    """Of a (rows, D, K - 1) tensor."""
    return (0, 0, 0) if states is None else tuple(stride * states.element_size() for stride in states.stride())
