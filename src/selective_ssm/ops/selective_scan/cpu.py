"""The selective scan on a CPU: hands the kernels of forward.cpp and backward.cpp their arguments.

Legend: B batch, L length, D channels in G groups, N state, S sequences in a row.
"""

from __future__ import annotations

import ctypes
import functools
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from selective_ssm.ops import native
from selective_ssm.ops.parameters import Parameters, pointer
from selective_ssm.ops.selective_scan.cpu_arguments import contiguous, fields, in_fp32_if_half
from selective_ssm.ops.selective_scan.inputs import Inputs, Options
from selective_ssm.ops.selective_scan.operands import count_groups
from selective_ssm.ops.selective_scan.step_cpu import step
from selective_ssm.ops.sequences import boundaries, covering

__all__ = ["backward", "forward", "saved_shape", "step"]

_LANES, _WIDTH, _WINDOW = 16, 64, 128
"""Numbers of a vector, channels of a block, tokens between two states that are kept: as in scan.hpp."""
_STEPS = 32
"""Tokens of a tile, as in forward.cpp."""
_STATES = 4
"""States that are gone through together, as in backward.hpp."""
_TASKS = 16
"""At most so many serve a row going backward, where each has sums of its own for the gradients of B and C. Rows that
have fewer are served side by side."""
_SLICES = 16
"""Into which tokens are cut going backward; after each, tasks' sums are added up, and their memory serves again."""


_SCAN = fields(
    "u delta z B C",
    "rates D delta_bias initial offsets scratch",
    "worker_scratch batch length channels groups states sequences softplus zoh B_fixed C_fixed reverse threads",
)


class _Forward(Parameters):
    _fields_: ClassVar = [*_SCAN, *fields("out", "final kept")]


class _Backward(Parameters):
    _fields_: ClassVar = [
        *_SCAN,
        *fields(
            "d_out d_u d_delta d_z d_B d_C",
            "kept d_final d_initial d_rates d_channels d_fixed_B d_fixed_C carry d_maps",
            "parts group_tasks slice",
        ),
    ]


class Plan(NamedTuple):
    """How the backward pass is dealt out, which decides in what order sums are added up."""

    parts: int  # of the rows, served side by side
    group_tasks: int  # into which the blocks of a group's channels are dealt out
    slice: int  # windows of a part's rows that are served before sums over channels are added up


def plan_backward(batch: int, length: int, channels: int, groups: int) -> Plan:
    """The plan for so many rows, tokens, channels and groups. It knows no number of threads, which thus changes no bit.

    Example:
        >>> plan_backward(1, 2048, 1536, 1), plan_backward(8, 512, 256, 1)
        (Plan(parts=1, group_tasks=16, slice=1), Plan(parts=4, group_tasks=4, slice=1))
    """
    group_tasks = min(-(-channels // groups // _WIDTH), max(1, _TASKS // groups))
    parts = min(batch, max(1, _TASKS // (groups * group_tasks)))
    return Plan(parts, group_tasks, max(1, -(-batch // parts) * -(-length // _WINDOW) // _SLICES))


def saved_shape(inputs: Inputs) -> tuple[int, ...]:
    """The states before every _WINDOW-th token of a row, groups filled up to whole vectors of channels."""
    batch, length, channels = inputs.u.shape
    groups = count_groups(inputs)
    return batch, max(length - 1, 0) // _WINDOW, inputs.A.shape[1], groups * _stride(channels // groups)


def forward(inputs: Inputs, options: Options, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns out (B, L, D), the final states (B or S, D, N) and, to `save`, the states that `backward` needs."""
    low, inputs = inputs.u.dtype, _readable(inputs)
    u, A = inputs.u, inputs.A
    out = u.new_empty(*u.shape)
    offsets = _offsets(inputs)
    rows = len(u) if inputs.cu_seqlens is None else len(offsets) - 1
    final = A.new_empty(rows, *A.shape)
    kept = A.new_empty(*saved_shape(inputs)) if save else None
    states = A.shape[1]
    memory = 3 * _STEPS * _WIDTH + 2 * _STEPS * states + 4 * states * _WIDTH
    threads = native.threads(u.numel() * states)
    scratch = A.new_empty(threads, memory)
    arguments = _Forward.of(
        *_scan(inputs, options, offsets, scratch), *_rows(out), final.data_ptr(), pointer(kept)
    )  # fmt: skip
    native.function("selective_scan_forward")(ctypes.byref(arguments))
    return out.to(low), final, kept


def backward(
    d_out: Tensor, d_final: Tensor | None, saved: Tensor, inputs: Inputs, options: Options
) -> tuple[Tensor | None, ...]:
    """The gradients of the differentiable inputs, in their order and dtypes; None where there is no input."""
    given, inputs = inputs, _readable(inputs)
    u, delta, A, B, C, _, z, _, initial, _ = inputs
    batch, length, channels = u.shape
    d_out = in_fp32_if_half(d_out if d_out.stride(-1) == 1 else d_out.contiguous())
    d_final = contiguous(d_final)
    groups, states, width = count_groups(inputs), A.shape[1], saved.shape[-1]
    plan = plan_backward(batch, length, channels, groups)
    d_u, d_delta = u.new_empty(*u.shape), delta.new_empty(*u.shape)
    d_z = None if z is None else z.new_empty(*u.shape)
    B_fixed, C_fixed = B.dim() == 2, C.dim() == 2
    d_B, d_C = (None if fixed else x.new_empty(*x.shape) for x, fixed in ((B, B_fixed), (C, C_fixed)))
    d_initial = None
    if initial is not None:  # that of an empty sequence is handed through
        d_initial = torch.zeros_like(initial) if d_final is None else d_final.clone()
    d_rates = A.new_zeros(plan.parts, states, width)
    d_channels = A.new_zeros(plan.parts, 2, width)
    d_fixed = [torch.zeros_like(d_rates) if fixed else None for fixed in (B_fixed, C_fixed)]
    carry = torch.empty_like(d_rates)
    d_maps = A.new_empty(plan.parts, groups * plan.group_tasks, plan.slice, min(_WINDOW, length), 2, states)
    memory = 6 * _WINDOW * _WIDTH + (4 * _WINDOW + 2) * _STATES * _LANES + (2 * _WINDOW + 5 * _WIDTH) * states
    scratch = A.new_empty(native.threads(u.numel() * states), memory)
    offsets = _offsets(inputs)
    arguments = _Backward.of(
        *_scan(inputs, options, offsets, scratch),
        *_rows(d_out), *_rows(d_u), *_rows(d_delta), *_rows(d_z), *_rows(d_B), *_rows(d_C),
        *map(pointer, (saved, d_final, d_initial, d_rates, d_channels, *d_fixed, carry, d_maps)), *plan,
    )  # fmt: skip
    native.function("selective_scan_backward")(ctypes.byref(arguments))

    def total(parts: Tensor) -> Tensor:
        """(parts, M, width) -> (D, M): no sum whose order torch chooses."""
        whole = functools.reduce(torch.add, parts)
        return whole.unflatten(-1, (groups, -1))[..., : channels // groups].flatten(-2).t()

    d_D, d_bias = total(d_channels).unbind(1)
    d_B, d_C = (total(sums) if sums is not None else x for sums, x in zip(d_fixed, (d_B, d_C), strict=True))
    found = (d_u, d_delta, total(d_rates), d_B, d_C, d_D, d_z, d_bias, d_initial)
    return tuple(
        None if x is None or gradient is None else gradient.to(x.dtype)
        for x, gradient in zip(given[:-1], found, strict=True)
    )


def _scan(inputs: Inputs, options: Options, offsets: Tensor, scratch: Tensor) -> tuple[int, ...]:
    """What both passes are told, in the order of _SCAN."""
    u, delta, A, B, C, D, z, delta_bias, initial, _ = inputs
    softplus, reverse, discretization = options
    return (
        *_rows(u), *_rows(delta), *_rows(z), *_rows(B), *_rows(C),
        *map(pointer, (A, D, delta_bias, initial, offsets, scratch)),
        scratch.shape[1], *u.shape, count_groups(inputs), A.shape[1], len(offsets) - 1,
        softplus, discretization == "zoh", B.dim() == 2, C.dim() == 2, reverse, len(scratch),
    )  # fmt: skip


def _readable(inputs: Inputs) -> Inputs:
    """As the kernels read them: the small ones contiguous, fp16 as fp32."""
    u, delta, A, B, C, D, z, delta_bias, initial, offsets = inputs
    B, C = (in_fp32_if_half(x.contiguous() if x.dim() == 2 else x) for x in (B, C))
    return Inputs(
        in_fp32_if_half(u), in_fp32_if_half(delta), A.contiguous(), B, C, contiguous(D), in_fp32_if_half(z),
        contiguous(delta_bias), contiguous(initial), offsets,
    )  # fmt: skip


def _offsets(inputs: Inputs) -> Tensor:
    """(S + 1,) int64 offsets of a row's sequences."""
    length, cu_seqlens = inputs.u.shape[1], inputs.cu_seqlens
    return boundaries(length, None, inputs.u.device) if cu_seqlens is None else covering(cu_seqlens, length)


def _stride(channels: int) -> int:
    """Channels of a group in the kernels' own memory."""
    return -(-channels // _LANES) * _LANES


def _rows(x: Tensor | None) -> tuple[int, ...]:
    """The fields of Rows for a (B, L, D), (B, L, N), (B, L, G, N) or contiguous (D, N) tensor."""
    if x is None:
        return 0, 0, 0, 0, 0
    batch, row, group = (*x.stride()[:-1], 0)[:3] if x.dim() > 2 else (0, 0, 0)
    return x.data_ptr(), batch, row, group, native.NUMBERS[x.dtype]
