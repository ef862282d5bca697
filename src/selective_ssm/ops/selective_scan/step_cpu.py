"""One token of the selective scan on a CPU: hands the kernel of step.cpp its arguments.

Legend: B batch, D channels in G groups, N state.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from selective_ssm.ops import native
from selective_ssm.ops.layouts import Layout, Layouts, layouts_of
from selective_ssm.ops.parameters import Parameters, pointer
from selective_ssm.ops.selective_scan.cpu_arguments import contiguous, fields, in_fp32_if_half
from selective_ssm.ops.selective_scan.inputs import Options, StepInputs


class _Step(Parameters):
    _fields_: ClassVar = fields(
        "u delta z B C out",
        "state rates D delta_bias slots",
        "slot_stride channel_stride state_stride"
        " batch channels groups states slot_count softplus zoh B_fixed C_fixed threads",
    )


class _Prepared(NamedTuple):
    """What a step takes but for addresses and the number of threads."""

    rows: tuple[tuple[int, ...], ...]  # of u, delta, z, B, C, out
    sizes: tuple[int, ...]
    numbers: int  # to compute
    is_readable: bool  # whether all is laid out as the kernel reads it


def step(
    state: Tensor,
    inputs: StepInputs,
    options: Options,
    state_indices: Tensor | None,
    layouts: Layouts | None = None,
) -> Tensor:
    """One token: updates `state` (slots, D, N) in place and returns out (B, D)."""
    if layouts is None:
        layouts = layouts_of(state, *inputs, state_indices)
    rows, sizes, numbers, is_readable = _prepared(layouts, options)
    if not is_readable:
        return step(state, _readable(inputs), options, contiguous(state_indices)).to(inputs.u.dtype)
    u, delta, A, B, C, D, z, delta_bias = inputs
    slots = state_indices if state_indices is None or state_indices.dtype == torch.int64 else state_indices.long()
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    arguments = _Step.of(
        u.data_ptr(), *rows[0], delta.data_ptr(), *rows[1], pointer(z), *rows[2],
        B.data_ptr(), *rows[3], C.data_ptr(), *rows[4], out.data_ptr(), *rows[5],
        state.data_ptr(), A.data_ptr(), pointer(D), pointer(delta_bias), pointer(slots),
        *sizes, native.threads(numbers),
    )  # fmt: skip
    native.function("selective_scan_step")(ctypes.byref(arguments))
    return out


@functools.lru_cache(1024)
def _prepared(layouts: Layouts, options: Options) -> _Prepared:
    state, u, delta, A, B, C, D, z, delta_bias, slots = layouts
    (batch, channels), (_, states) = u[0], A[0]
    small = [A, D, delta_bias, slots, *(x for x in (B, C) if _is_fixed(x, batch))]
    is_readable = all(x is None or _is_contiguous(x) for x in small) and not any(
        x is not None and x[2] == torch.float16 for x in (u, delta, B, C, z)
    )
    rows = tuple(_rows(x, batch) for x in (u, delta, z, B, C, (u[0], (channels, 1), *u[2:]))) if is_readable else ()
    groups = max(x[0][1] if len(x[0]) == 3 else 1 for x in (B, C))
    sizes = (
        *state[1], batch, channels, groups, states, state[0][0],
        options.delta_softplus, options.discretization == "zoh", _is_fixed(B, batch), _is_fixed(C, batch),
    )  # fmt: skip
    return _Prepared(rows, sizes, batch * channels * states, is_readable)


def _rows(x: Layout | None, batch: int) -> tuple[int, ...]:
    """The fields of Rows after the address, for (B, D), (B, N) or (B, G, N); those of (D, N) follow each other."""
    if x is None or _is_fixed(x, batch):
        return 0, 0, 0, 0 if x is None else native.NUMBERS[x[2]]
    return x[1][0], 0, x[1][1] if len(x[0]) == 3 else 0, native.NUMBERS[x[2]]


def _is_fixed(x: Layout, batch: int) -> bool:
    """Whether B or C is time-invariant (see `StepInputs`)."""
    return len(x[0]) == 2 and x[0][0] != batch


def _is_contiguous(x: Layout) -> bool:
    shape, strides, *_ = x
    return all(strides[i] == math.prod(shape[i + 1 :]) for i in range(len(shape)) if shape[i] > 1)


def _readable(inputs: StepInputs) -> StepInputs:
    """As the kernel reads them: the small ones contiguous, fp16 as fp32."""
    batch = len(inputs.u)
    u, delta, A, B, C, D, z, delta_bias = inputs
    B, C = (in_fp32_if_half(x.contiguous() if x.dim() == 2 and len(x) != batch else x) for x in (B, C))
    u, delta, z = in_fp32_if_half(u), in_fp32_if_half(delta), in_fp32_if_half(z)
    return StepInputs(u, delta, A.contiguous(), B, C, contiguous(D), z, contiguous(delta_bias))
