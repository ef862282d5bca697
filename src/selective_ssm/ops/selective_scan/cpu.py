"""The selective scan on a CPU: hands the kernels of forward.cpp, backward.cpp and handover.cpp their arguments.

Legend: B batch, L length, D channels in G groups, N state, S sequences in a row.
"""

from __future__ import annotations

import ctypes
import functools
from typing import ClassVar

import torch
from torch import Tensor

from selective_ssm.ops import native
from selective_ssm.ops.parameters import Parameters, pointer
from selective_ssm.ops.selective_scan.cpu_arguments import contiguous, fields, in_fp32_if_half
from selective_ssm.ops.selective_scan.cpu_plan import LANES, WINDOW, Layout, deal_backward, lay_out
from selective_ssm.ops.selective_scan.inputs import Inputs, Options
from selective_ssm.ops.selective_scan.operands import count_groups
from selective_ssm.ops.selective_scan.step_cpu import step
from selective_ssm.ops.sequences import boundaries, covering

__all__ = ["backward", "forward", "saved_shape", "step"]

_STEPS = 32
"""Tokens of a tile, as in forward.cpp and handover.cpp."""
_STATES = 4
"""States that are gone through together, as in backward.hpp."""


_SCAN = fields(
    "u delta z B C",
    "rates D delta_bias initial offsets scratch handed",
    "worker_scratch batch length channels groups states sequences "
    "softplus zoh B_fixed C_fixed reverse threads width piece",
)


class _Forward(Parameters):
    _fields_: ClassVar = [*_SCAN, *fields("out", "final kept")]


class _HandOver(Parameters):
    _fields_: ClassVar = [*_SCAN, *fields("d_out", "d_final steps")]


class _Backward(Parameters):
    _fields_: ClassVar = [
        *_SCAN,
        *fields(
            "d_out d_u d_delta d_z d_B d_C",
            "kept d_final d_initial d_rates d_channels d_fixed_B d_fixed_C carry d_maps",
            "parts group_tasks slice",
        ),
    ]


def saved_shape(inputs: Inputs) -> tuple[int, ...]:
    """The states before every WINDOW-th token of a row, groups filled up to whole vectors of channels."""
    batch, length, channels = inputs.u.shape
    groups = count_groups(inputs)
    return batch, max(length - 1, 0) // WINDOW, inputs.A.shape[1], _stride(channels, groups)


def forward(inputs: Inputs, options: Options, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns out (B, L, D), the final states (B or S, D, N) and, to `save`, the states that `backward` needs."""
    low, inputs = inputs.u.dtype, _readable(inputs)
    u, A = inputs.u, inputs.A
    out = u.new_empty(*u.shape)
    offsets = _offsets(inputs)
    rows = len(u) if inputs.cu_seqlens is None else len(offsets) - 1
    final = A.new_empty(rows, *A.shape)
    kept = A.new_empty(*saved_shape(inputs)) if save else None
    batch, length, channels = u.shape
    states, layout = A.shape[1], lay_out(batch, length, channels, count_groups(inputs))
    handed = _hand_over(inputs, options, offsets, layout)
    scratch = _scratch(inputs, 3 * _STEPS * layout.width + 2 * _STEPS * states + 4 * states * layout.width)
    arguments = _Forward.of(
        *_scan(inputs, options, offsets, layout, scratch, handed), *_rows(out), final.data_ptr(), pointer(kept)
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
    layout, dealing = deal_backward(batch, length, channels, groups)
    d_u, d_delta = u.new_empty(*u.shape), delta.new_empty(*u.shape)
    d_z = None if z is None else z.new_empty(*u.shape)
    B_fixed, C_fixed = B.dim() == 2, C.dim() == 2
    d_B, d_C = (None if fixed else x.new_empty(*x.shape) for x, fixed in ((B, B_fixed), (C, C_fixed)))
    d_initial = None
    if initial is not None:  # that of an empty sequence is handed through
        d_initial = torch.zeros_like(initial) if d_final is None else d_final.clone()
    d_rates = A.new_zeros(dealing.parts, states, width)
    d_channels = A.new_zeros(dealing.parts, 2, width)
    d_fixed = [torch.zeros_like(d_rates) if fixed else None for fixed in (B_fixed, C_fixed)]
    carry = torch.empty_like(d_rates)
    d_maps = A.new_empty(dealing.parts, groups * dealing.group_tasks, dealing.slice, min(WINDOW, length), 2, states)
    offsets = _offsets(inputs)
    handed = _hand_over(inputs, options, offsets, layout, d_out, d_final)
    vectors = 6 * WINDOW * layout.width + (4 * WINDOW + 2) * _STATES * LANES
    scratch = _scratch(inputs, vectors + (2 * WINDOW + 5 * layout.width) * states)
    arguments = _Backward.of(
        *_scan(inputs, options, offsets, layout, scratch, handed),
        *_rows(d_out), *_rows(d_u), *_rows(d_delta), *_rows(d_z), *_rows(d_B), *_rows(d_C),
        *map(pointer, (saved, d_final, d_initial, d_rates, d_channels, *d_fixed, carry, d_maps)), *dealing,
    )  # fmt: skip
    native.function("selective_scan_backward")(ctypes.byref(arguments))

    def total(parts: Tensor) -> Tensor:
        """(parts, M, width) -> (D, M): no sum whose order torch chooses."""
        whole = functools.reduce(Tensor.add_, parts)
        return whole.unflatten(-1, (groups, -1))[..., : channels // groups].flatten(-2).t()

    d_D, d_bias = total(d_channels).unbind(1)
    d_B, d_C = (total(sums) if sums is not None else x for sums, x in zip(d_fixed, (d_B, d_C), strict=True))
    found = (d_u, d_delta, total(d_rates), d_B, d_C, d_D, d_z, d_bias, d_initial)
    return tuple(
        None if x is None or gradient is None else gradient.to(x.dtype)
        for x, gradient in zip(given[:-1], found, strict=True)
    )


def _hand_over(
    inputs: Inputs,
    options: Options,
    offsets: Tensor,
    layout: Layout,
    d_out: Tensor | None = None,
    d_final: Tensor | None = None,
) -> Tensor | None:
    """The states between pieces, (B, pieces - 1, N, stride), or given d_out their gradients; None for whole rows."""
    batch, length, channels = inputs.u.shape
    states, borders = inputs.A.shape[1], layout.pieces(length) - 1
    if borders < 1:
        return None
    handed = inputs.A.new_empty(batch, borders, states, _stride(channels, count_groups(inputs)))
    steps = torch.empty_like(handed[:, :, 0])
    scratch = _scratch(inputs, 2 * _STEPS * layout.width + _STEPS * states + 3 * states * layout.width)
    arguments = _HandOver.of(
        *_scan(inputs, options, offsets, layout, scratch, handed), *_rows(d_out), pointer(d_final), steps.data_ptr()
    )  # fmt: skip
    native.function("selective_scan_hand_over")(ctypes.byref(arguments))
    return handed


def _scratch(inputs: Inputs, numbers: int) -> Tensor:
    """Memory of so many numbers for each thread."""
    return inputs.A.new_empty(native.threads(inputs.u.numel() * inputs.A.shape[1]), numbers)


def _scan(
    inputs: Inputs, options: Options, offsets: Tensor, layout: Layout, scratch: Tensor, handed: Tensor | None
) -> tuple[int, ...]:
    """What all kernels are told, in the order of _SCAN."""
    u, delta, A, B, C, D, z, delta_bias, initial, _ = inputs
    softplus, reverse, discretization = options
    return (
        *_rows(u), *_rows(delta), *_rows(z), *_rows(B), *_rows(C),
        *map(pointer, (A, D, delta_bias, initial, offsets, scratch, handed)),
        scratch.shape[1], *u.shape, count_groups(inputs), A.shape[1], len(offsets) - 1,
        softplus, discretization == "zoh", B.dim() == 2, C.dim() == 2, reverse, len(scratch), *layout,
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


def _stride(channels: int, groups: int) -> int:
    """Channels in the kernels' own memory, in which groups are filled up to whole vectors."""
    return groups * -(-channels // groups // LANES) * LANES


def _rows(x: Tensor | None) -> tuple[int, ...]:
    """The fields of Rows for a (B, L, D), (B, L, N), (B, L, G, N) or contiguous (D, N) tensor."""
    if x is None:
        return 0, 0, 0, 0, 0
    batch, row, group = (*x.stride()[:-1], 0)[:3] if x.dim() > 2 else (0, 0, 0)
    return x.data_ptr(), batch, row, group, native.NUMBERS[x.dtype]
