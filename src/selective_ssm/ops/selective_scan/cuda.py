"""The selective scan on NVIDIA GPUs: hands the kernels of forward.cu, backward.cu and step.cu their arguments.

Legend: B batch, L length, D channels in G groups, N state, S sequences in a row.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from selective_ssm.ops import nvrtc
from selective_ssm.ops.driver import current_stream, most_shared
from selective_ssm.ops.parameters import Parameters, pointer
from selective_ssm.ops.selective_scan.inputs import Inputs, Options
from selective_ssm.ops.selective_scan.operands import count_groups
from selective_ssm.ops.selective_scan.plan import CHUNK, STATES, THREADS, Plan, plan_backward, plan_forward, slots
from selective_ssm.ops.selective_scan.step_cuda import step

__all__ = ["backward", "forward", "saved_shape", "step"]

_FOLDER = Path(__file__).parent
_PARTS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}
"""How many bf16 numbers carry one of a gradient's sums."""
_IN_TWO_ROLES = ("selective_scan_forward", "selective_scan_summary")  # whose blocks have scanners and helpers
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "row", "group")]


def _fields(pointers: str, strides: str, numbers: str) -> list[tuple[str, type]]:
    return [
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, _Strides) for name in strides.split()),
        ("length", ctypes.c_int64),
        *((name, ctypes.c_int) for name in numbers.split()),
    ]


class _Forward(Parameters):
    _fields_: ClassVar = _fields(
        "u delta z B C A D delta_bias initial offsets out final kept piece_state piece_time",
        "u_stride delta_stride z_stride B_stride C_stride out_stride",
        "channels groups sequences pieces kept_states wide_offsets reverse",
    )


class _Backward(Parameters):
    _fields_: ClassVar = _fields(
        "d_out u delta z B C A D delta_bias initial offsets kept d_final d_u d_delta d_z d_initial"
        " B_parts C_parts A_parts D_parts bias_parts piece_grad piece_time",
        "d_out_stride u_stride delta_stride z_stride B_stride C_stride out_stride",
        "channels groups batch sequences slots pieces kept_states wide_offsets reverse",
    )


class _Job(ctypes.Structure):
    _fields_ = [
        ("parts", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("part_count", ctypes.c_int),
        ("format", ctypes.c_int),
    ]


class _Sum(Parameters):
    _fields_: ClassVar = [(f"job_{i}", _Job) for i in range(5)]


class _Kind(NamedTuple):
    """What the kernels are compiled for."""

    u: torch.dtype
    delta: torch.dtype
    z: torch.dtype | None
    B: torch.dtype
    C: torch.dtype
    states: int
    softplus: bool
    zoh: bool
    B_fixed: bool
    C_fixed: bool
    aligned: bool
    maps_aligned: bool

    @property
    def passes(self) -> int:
        return -(-self.states // STATES)

    def defines(self, plan: Plan) -> tuple[tuple[str, str | int], ...]:
        return (
            ("U", nvrtc.NUMBER_TYPES[self.u]),
            ("DELTA", nvrtc.NUMBER_TYPES[self.delta]),
            ("Z", nvrtc.NUMBER_TYPES[self.z or self.u]),
            ("B_MAP", nvrtc.NUMBER_TYPES[self.B]),
            ("C_MAP", nvrtc.NUMBER_TYPES[self.C]),
            ("THREADS", plan.threads),
            ("N", self.states),
            ("LANES", plan.lanes),
            ("HAS_Z", int(self.z is not None)),
            ("SOFTPLUS", int(self.softplus)),
            ("ZOH", int(self.zoh)),
            ("B_FIXED", int(self.B_fixed)),
            ("C_FIXED", int(self.C_fixed)),
            ("ALIGNED", int(self.aligned)),
            ("MAPS_ALIGNED", int(self.maps_aligned)),
        )


def _forward_shared(kind: _Kind, plan: Plan) -> int:
    """The bytes of `Shared` in forward.cu."""
    tile = 2 * plan.steps * (2 * STATES + 4 + 3 * plan.channels + 32 // plan.lanes)
    octets, turns = -(-plan.steps * plan.channels // (8 * THREADS)), -(-plan.steps // 32)
    sizes = octets * (kind.u.itemsize + kind.delta.itemsize + (kind.z or kind.u).itemsize)
    sizes += turns * (kind.B.itemsize + kind.C.itemsize)
    return 4 * tile + 8 * THREADS * sizes


def _backward_shared(kind: _Kind, plan: Plan) -> int:
    """The bytes of `Shared` in backward.cu."""
    tile = CHUNK * (2 * (plan.channels + 2) + 2 * (plan.channels + 8) + 2 * STATES)
    sums = 4 * (1 if kind.passes == 1 else CHUNK * plan.channels)
    runs = CHUNK // 8 * plan.threads * 8
    totals = plan.threads // 32 * plan.channels * 2
    return 4 * (tile + sums + runs + 2 * plan.channels + totals)


def _parts(kind: _Kind) -> int:
    return max(_PARTS[dtype] for dtype in (kind.B, kind.C, kind.z or kind.u))


@functools.cache
def _kernel(source: str, name: str, kind: _Kind, plan: Plan, device: int) -> nvrtc.Kernel:
    if source == "forward.cu":
        shared = _forward_shared(kind, plan)
        extra = (
            ("STEPS", plan.steps),
            ("UNROLLED", plan.unrolled),
            ("MIN_BLOCKS", plan.blocks_a_multiprocessor if kind.passes == 1 else 1),
        )
    else:
        shared = _backward_shared(kind, plan)
        extra = (("PARTS", _parts(kind)), ("MIN_BLOCKS", 2 if kind.passes == 1 else 1))
    if name.endswith("hand_over"):
        shared = 0
    return nvrtc.kernel(_FOLDER / source, name, (*kind.defines(plan), *extra), device, shared)


class _Machine(NamedTuple):
    multiprocessors: int
    shared: int  # bytes that a block can have


@functools.cache
def _machine(device: int) -> _Machine:
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", None)  # older torch does not tell
    return _Machine(properties.multi_processor_count, shared or most_shared(device))


@functools.cache
def _sum_kernel(device: int) -> nvrtc.Kernel:
    return nvrtc.kernel(_FOLDER / "sum.cu", "sum_parts", (), device)


def _rows(x: Tensor | None) -> tuple[int, tuple[int, int, int], int]:
    """Where the rows of a (B, L, D), (B, L, N) or (B, L, G, N) tensor lie; those of a (D, N) one follow each other.

    Its address, its strides along batch, length and groups, and the bits of all these in bytes.
    """
    if x is None:
        return 0, (0, 0, 0), 0
    address, strides = x.data_ptr(), x.stride()
    if len(strides) == 2:
        return address, (0, 0, 0), address | strides[0] * x.itemsize
    batch, row, group = strides[:3] if len(strides) == 4 else (*strides[:2], 0)
    return address, (batch, row, group), address | (batch | row | group) * x.itemsize


class _Call(NamedTuple):
    """What forward and backward need to know of a call."""

    kind: _Kind
    plan: Plan
    device: int
    groups: int
    sequences: int
    machine: _Machine
    pointers: tuple[int, ...]  # of the tensors with rows, in the order of the structures' fields
    strides: tuple[int, ...]

    @classmethod
    def of(cls, inputs: Inputs, options: Options, plan: Callable[..., Plan], *others: Tensor) -> _Call:
        """`others` are sequences that are read too."""
        u, delta, A, B, C, _, z, _, _, offsets = inputs
        batch, length, channels = u.shape
        sequences = batch if offsets is None else offsets.shape[0] - 1
        device, groups, (_, states) = u.get_device(), count_groups(inputs), A.shape
        machine = _machine(device)
        pointers, strides, bits = zip(*map(_rows, (*others, u, delta, z, B, C)), strict=True)
        *sequence_bits, B_bits, C_bits = bits
        softplus, _, discretization = options
        kind = _Kind(
            u.dtype, delta.dtype, None if z is None else z.dtype, B.dtype, C.dtype, states,
            softplus, discretization == "zoh", B.dim() == 2, C.dim() == 2,
            channels // groups % 8 == 0 and functools.reduce(operator.or_, sequence_bits) % 16 == 0,
            states % 8 == 0 and (B_bits | C_bits) % 16 == 0,
        )  # fmt: skip
        chosen = plan(sequences, length, channels, groups, machine.multiprocessors)
        if plan is plan_backward and _backward_shared(kind, chosen) > machine.shared:
            chosen = plan(sequences, length, channels, groups, machine.multiprocessors, threads=THREADS // 2)
        return cls(kind, chosen, device, groups, sequences, machine, pointers, tuple(itertools.chain(*strides)))

    def launch(self, source: str, name: str, blocks: int, parameters: ctypes.Structure) -> None:
        threads = self.plan.threads * (2 if name in _IN_TWO_ROLES else 1)
        kernel = _kernel(source, name, self.kind, self.plan, self.device)
        stream = current_stream(self.device)
        kernel((blocks, 1, 1), threads, parameters, stream)


def _contiguous(inputs: Inputs) -> Inputs:
    """With the small tensors laid out as the kernels read them."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, offsets = inputs
    return Inputs(
        u, delta, A.contiguous(), B.contiguous() if B.dim() == 2 else B, C.contiguous() if C.dim() == 2 else C,
        None if D is None else D.contiguous(), z, None if delta_bias is None else delta_bias.contiguous(),
        None if initial_state is None else initial_state.contiguous(),
        None if offsets is None else offsets.contiguous(),
    )  # fmt: skip


def saved_shape(inputs: Inputs) -> tuple[int, ...]:
    """The states before every CHUNK-th token of a row: (B, (L - 1) // CHUNK, D, N)."""
    batch, length, channels = inputs.u.shape
    return (batch, max(length - 1, 0) // CHUNK, channels, inputs.A.shape[1])


def forward(inputs: Inputs, options: Options, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns out (B, L, D), the final states (B or S, D, N) and, to `save`, the states that `backward` needs."""
    inputs = _contiguous(inputs)
    u, _, A, _, _, D, _, delta_bias, initial, offsets = inputs
    batch, length, channels = u.shape
    call = _Call.of(inputs, options, plan_forward)
    pieces = call.plan.pieces
    out = u.new_empty(batch, length, channels)
    final = A.new_empty(call.sequences, *A.shape)
    kept = A.new_empty(*saved_shape(inputs)) if save else None
    piece_state = A.new_empty(call.sequences, pieces, *A.shape) if pieces > 1 else None
    piece_time = A.new_empty(call.sequences, pieces, channels) if pieces > 1 else None
    parameters = _Forward.of(
        *call.pointers, *map(pointer, (A, D, delta_bias, initial, offsets, out, final, kept, piece_state, piece_time)),
        *call.strides, length * channels, channels, 0,
        length, channels, call.groups, call.sequences, pieces, saved_shape(inputs)[1],
        offsets is not None and offsets.dtype == torch.int64, options.reverse,
    )  # fmt: skip
    blocks = call.plan.blocks(channels, call.groups) * call.sequences * pieces
    if pieces > 1:
        call.launch("forward.cu", "selective_scan_summary", blocks, parameters)
        states = call.sequences * A.numel()
        call.launch("forward.cu", "selective_scan_hand_over", -(-states // call.plan.threads), parameters)
    call.launch("forward.cu", "selective_scan_forward", blocks, parameters)
    return out, final, kept


def backward(
    d_out: Tensor, d_final: Tensor | None, saved: Tensor, inputs: Inputs, options: Options
) -> tuple[Tensor | None, ...]:
    """The gradients of the differentiable inputs, in their order and dtypes; None where there is no input."""
    inputs = _contiguous(inputs)
    u, delta, A, B, C, D, z, delta_bias, initial, offsets = inputs
    batch, length, channels = u.shape
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    call = _Call.of(inputs, options, plan_backward, d_out)
    pieces, groups = call.plan.pieces, call.groups
    d_final = None if d_final is None else d_final.contiguous()
    d_u, d_delta = u.new_empty(*u.shape), delta.new_empty(*u.shape)
    d_z = None if z is None else z.new_empty(*u.shape)
    d_initial = None if initial is None else torch.empty_like(initial)

    lots = slots(call.plan, call.sequences, channels, groups, call.machine.multiprocessors)
    parts = lots * pieces
    blocks = call.plan.blocks(channels, groups)

    def parts_of_map(x: Tensor, fixed: bool) -> Tensor:
        return A.new_empty(parts if fixed else blocks // groups, *x.shape)

    B_parts, C_parts = parts_of_map(B, call.kind.B_fixed), parts_of_map(C, call.kind.C_fixed)
    A_parts = A.new_empty(parts, *A.shape)
    D_parts = None if D is None else A.new_empty(parts, channels)
    bias_parts = None if delta_bias is None else A.new_empty(parts, channels)
    piece_grad = A.new_empty(call.sequences, pieces, *A.shape) if pieces > 1 else None
    piece_time = A.new_empty(call.sequences, pieces, channels) if pieces > 1 else None
    parameters = _Backward.of(
        *call.pointers, *map(pointer, (A, D, delta_bias, initial, offsets, saved, d_final)),
        *map(pointer, (d_u, d_delta, d_z, d_initial)),
        *map(pointer, (B_parts, C_parts, A_parts, D_parts, bias_parts, piece_grad, piece_time)),
        *call.strides, length * channels, channels, 0,
        length, channels, groups, batch, call.sequences, lots, pieces, saved.shape[1],
        offsets is not None and offsets.dtype == torch.int64, options.reverse,
    )  # fmt: skip
    if pieces > 1:
        call.launch("backward.cu", "selective_scan_backward_summary", blocks * parts, parameters)
        states = call.sequences * A.numel()
        call.launch("backward.cu", "selective_scan_backward_hand_over", -(-states // call.plan.threads), parameters)
    call.launch("backward.cu", "selective_scan_backward", blocks * parts, parameters)

    sums = [(B_parts, B), (C_parts, C), (A_parts, A), (D_parts, D), (bias_parts, delta_bias)]
    d_B, d_C, d_A, d_D, d_bias = _sum(sums, call.device)
    return d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_bias, d_initial


def _sum(sums: list[tuple[Tensor | None, Tensor | None]], device: int) -> list[Tensor | None]:
    """Each (parts, ...) tensor summed over its parts, in the dtype of the tensor beside it."""
    totals: list[Tensor | None] = []
    jobs: list[int] = []
    blocks = 0
    for parts, like in sums:
        if parts is None or like is None:
            totals.append(None)
            jobs += (0, 0, 0, 0, 0)
            continue
        total, count = like.new_empty(*like.shape), like.numel()
        totals.append(total)
        jobs += (parts.data_ptr(), total.data_ptr(), count, parts.shape[0], _FORMATS[total.dtype])
        blocks += -(-count // 256)
    stream = current_stream(device)
    _sum_kernel(device)((blocks, 1, 1), 256, _Sum.of(*jobs), stream)
    return totals
