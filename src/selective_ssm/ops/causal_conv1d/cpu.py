"""The causal convolution on a CPU: hands the kernels of cpu.cpp and step.cpp their arguments.

Legend: B batch, L length, D channels, K width, S sequences in a row. Kernels read and write x, what has its shape, and
the state of a step in their own dtypes; what is small they get in fp32.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from selective_ssm.ops import native
from selective_ssm.ops.causal_conv1d.inputs import Inputs, Options, StepInputs
from selective_ssm.ops.layouts import Layouts
from selective_ssm.ops.parameters import Parameters, pointer
from selective_ssm.ops.sequences import covering

RUN = 256
"""Tokens of a task, as in conv.hpp."""
TILE = 16
"""Tokens that a task has in its scratch memory at once, as in conv.hpp."""


def _fields(pointers: str, sizes: str, numbers: str) -> list[tuple[str, type]]:
    kinds = ((pointers, ctypes.c_void_p), (sizes, ctypes.c_int64), (numbers, ctypes.c_int))
    return [(name, kind) for names, kind in kinds for name in names.split()]


class _Conv(Parameters):
    _fields_: ClassVar = _fields(
        pointers="x weight bias state offsets out final_state scratch"
        " d_out d_final d_x d_state partials d_weight d_bias",
        sizes="x_batch x_token d_out_batch d_out_token batch length sequences channels width block scratch_size",
        numbers="number threads reverse silu",
    )


class _Step(Parameters):
    _fields_: ClassVar = _fields(
        pointers="out state x weight bias slots",
        sizes="x_row state_slot state_channel state_entry batch slot_count channels width",
        numbers="number state_number threads silu",
    )


def forward(inputs: Inputs, options: Options, save: bool) -> tuple[Tensor, Tensor, None]:
    """Returns out (B, L, D) and the final state (B or S, D, K - 1); `backward` needs nothing but the inputs."""
    x, (channels, width) = inputs.x, inputs.weight.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    final = x.new_empty((x.shape[0] * _count_sequences(inputs), channels, width - 1), dtype=torch.float32)
    _launch("causal_conv1d", inputs, options, out=out, final_state=final)
    return out, final.to(x.dtype), None


def saved_shape(inputs: Inputs) -> tuple[int, ...]:
    """Nothing is kept."""
    return (0,)


def backward(
    d_out: Tensor, d_final: Tensor | None, saved: Tensor, inputs: Inputs, options: Options
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and initial_state, in their dtypes; None where there is no input."""
    x, weight, bias, state, _ = inputs
    batch, length, channels = x.shape
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    d_weight = weight.new_empty(weight.shape, dtype=torch.float32)
    d_bias = None if bias is None else bias.new_empty(bias.shape, dtype=torch.float32)
    d_state = None if state is None else state.new_empty(state.shape, dtype=torch.float32)
    partials = d_weight.new_empty(batch * -(-length // RUN), weight.shape[1] + 1, channels)
    _launch(
        "causal_conv1d_backward",
        inputs,
        options,
        d_out=d_out if d_out.stride(-1) == 1 else d_out.contiguous(),
        d_final=_single(d_final),
        d_x=d_x,
        d_state=d_state,
        partials=partials,
        d_weight=d_weight,
        d_bias=d_bias,
    )
    return (
        d_x,
        d_weight.to(weight.dtype),
        None if bias is None or d_bias is None else d_bias.to(bias.dtype),
        None if state is None or d_state is None else d_state.to(state.dtype),
    )


def step(
    state: Tensor,
    inputs: StepInputs,
    options: Options,
    state_indices: Tensor | None,
    layouts: Layouts | None = None,
) -> Tensor:
    """One token: updates `state` (slots, D, K - 1) in place and returns out (B, D)."""
    x, weight, bias = inputs
    if state.dtype not in native.NUMBERS:
        wide = state.float()
        out = step(wide, inputs, options, state_indices)
        state.copy_(wide)
        return out
    batch, channels = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    weight, bias = weight.float().contiguous(), _single(bias)
    slots = None if state_indices is None else state_indices.long().contiguous()
    threads = native.threads(x.numel() * weight.shape[1])
    parameters = _Step.of(
        out.data_ptr(), state.data_ptr(), x.data_ptr(), weight.data_ptr(), pointer(bias), pointer(slots),
        x.stride(0), *state.stride(), batch, len(state), channels, weight.shape[1],
        native.NUMBERS[x.dtype], native.NUMBERS[state.dtype], threads, options.activation == "silu",
    )  # fmt: skip
    native.function("causal_conv1d_step")(ctypes.byref(parameters))
    return out


def _launch(name: str, inputs: Inputs, options: Options, **others: Tensor | None) -> None:
    """Runs a kernel on the inputs and on other tensors, by their names in `_Conv`."""
    x, weight, bias, state, cu_seqlens = inputs
    batch, length, channels = x.shape
    width = weight.shape[1]
    threads = native.threads(x.numel())
    block = _block(channels, width)
    size = (block + 16) * (2 * (width + 1) + 2 * (width - 1 + TILE))
    tensors = {
        "x": x,
        "weight": weight.float().contiguous(),
        "bias": _single(bias),
        "state": _single(state),
        "offsets": None if cu_seqlens is None else covering(cu_seqlens, length),
        "scratch": x.new_empty(threads * size, dtype=torch.float32),
        **others,
    }
    d_out = others.get("d_out")
    parameters = _Conv(
        **{name: pointer(tensor) for name, tensor in tensors.items()},
        x_batch=x.stride(0),
        x_token=x.stride(1),
        d_out_batch=0 if d_out is None else d_out.stride(0),
        d_out_token=0 if d_out is None else d_out.stride(1),
        batch=batch,
        length=length,
        sequences=_count_sequences(inputs),
        channels=channels,
        width=width,
        block=block,
        scratch_size=size,
        number=native.NUMBERS[x.dtype],
        threads=threads,
        reverse=options.reverse,
        silu=options.activation == "silu",
    )
    native.function(name)(ctypes.byref(parameters))


def _block(channels: int, width: int) -> int:
    """Channels of a task, whose tiles should stay in the first cache."""
    widest = 256 if width <= 16 else 16
    return min(widest, -(-channels // 16) * 16)


def _count_sequences(inputs: Inputs) -> int:
    """Of each row."""
    return 1 if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1


def _single(x: Tensor | None) -> Tensor | None:
    """In fp32, without gaps."""
    return None if x is None else x.float().contiguous()
