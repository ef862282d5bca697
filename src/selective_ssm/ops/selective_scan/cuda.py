"""The selective scan on NVIDIA GPUs: hands the kernels of forward.cu, backward.cu and step.cu their arguments.

Legend: B batch, L length, D channels in G groups, N state, S sequences in a row.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from selective_ssm.ops import nvrtc
from selective_ssm.ops.selective_scan.inputs import Inputs, Options
from selective_ssm.ops.selective_scan.operands import count_groups
from selective_ssm.ops.selective_scan.plan import CHUNK, STATES, THREADS, Plan, plan_backward, plan_forward, slots
from selective_ssm.ops.selective_scan.step_cuda import step

__all__ = ["backward", "forward", "saved_shape", "step"]

_FOLDER = Path(__file__).parent
_WORDS = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
_PARTS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}
"""How many bf16 numbers carry one of a gradient's sums."""
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


class _Forward(ctypes.Structure):
    _fields_ = _fields(
        "u delta z B C A D delta_bias initial offsets out final kept piece_state piece_time",
        "u_stride delta_stride z_stride B_stride C_stride out_stride",
        "channels groups sequences pieces kept_states wide_offsets reverse",
    )


class _Backward(ctypes.Structure):
    _fields_ = _fields(
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


class _Sum(ctypes.Structure):
    _fields_ = [("jobs", _Job * 5)]


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

    @classmethod
    def of(cls, inputs: Inputs, options: Options, groups: int, d_out: Tensor | None = None) -> _Kind:
        u, delta, A, B, C, _, z, *_ = inputs
        return cls(
            u.dtype, delta.dtype, None if z is None else z.dtype, B.dtype, C.dtype, A.shape[1],
            options.delta_softplus, options.discretization == "zoh", B.dim() == 2, C.dim() == 2,
            u.shape[-1] // groups % 8 == 0 and _in_vectors(u, delta, z, d_out),
            A.shape[1] % 8 == 0 and _in_vectors(B, C),
        )  # fmt: skip

    @property
    def passes(self) -> int:
        return -(-self.states // STATES)

    def defines(self, plan: Plan) -> tuple[tuple[str, str | int], ...]:
        return (
            ("U", _WORDS[self.u]),
            ("DELTA", _WORDS[self.delta]),
            ("Z", _WORDS[self.z or self.u]),
            ("B_MAP", _WORDS[self.B]),
            ("C_MAP", _WORDS[self.C]),
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
    runs = CHUNK // 8 * THREADS * 8
    totals = THREADS // 32 * plan.channels * 2
    return 4 * (tile + sums + runs + 2 * plan.channels + totals)


def _parts(kind: _Kind) -> int:
    return max(_PARTS[dtype] for dtype in (kind.B, kind.C, kind.z or kind.u))


@functools.cache
def _kernel(source: str, name: str, kind: _Kind, plan: Plan, device: int) -> nvrtc.Kernel:
    if source == "forward.cu":
        shared = _forward_shared(kind, plan)
        extra = (("STEPS", plan.steps), ("UNROLLED", 16), ("MIN_BLOCKS", 2 if kind.passes == 1 else 1))
    else:
        shared = _backward_shared(kind, plan)
        extra = (("PARTS", _parts(kind)), ("MIN_BLOCKS", 2 if kind.passes == 1 else 1))
    if name.endswith("hand_over"):
        shared = 0
    return nvrtc.kernel(_FOLDER / source, name, (*kind.defines(plan), *extra), device, shared)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _strides(x: Tensor | None) -> _Strides:
    """Of a (B, L, D) or (B, L, G, N) tensor; a time-invariant map (D, N) has none."""
    if x is None or x.dim() == 2:
        return _Strides(0, 0, 0)
    return _Strides(*x.stride()[:3]) if x.dim() == 4 else _Strides(x.stride(0), x.stride(1), 0)


def _in_vectors(*tensors: Tensor | None) -> bool:
    """Whether every row of these begins at a multiple of 16 bytes."""
    return all(
        x is None or (x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1]))
        for x in tensors
    )


class _Call(NamedTuple):
    """What forward and backward need to know of a call."""

    kind: _Kind
    plan: Plan
    device: int
    groups: int
    sequences: int
    multiprocessors: int

    @classmethod
    def of(cls, inputs: Inputs, options: Options, plan: Callable[..., Plan], d_out: Tensor | None = None) -> _Call:
        u, offsets = inputs.u, inputs.cu_seqlens
        sequences = u.shape[0] if offsets is None else offsets.shape[0] - 1
        device, groups = u.get_device(), count_groups(inputs)
        multiprocessors = _multiprocessors(device)
        chosen = plan(sequences, u.shape[1], u.shape[2], groups, multiprocessors)
        return cls(_Kind.of(inputs, options, groups, d_out), chosen, device, groups, sequences, multiprocessors)

    def launch(
        self, source: str, name: str, blocks: int, parameters: ctypes.Structure, threads: int = THREADS
    ) -> None:
        kernel = _kernel(source, name, self.kind, self.plan, self.device)
        kernel((blocks, 1, 1), threads, parameters, torch._C._cuda_getCurrentRawStream(self.device))


def _contiguous(inputs: Inputs) -> Inputs:
    """With the small tensors laid out as the kernels read them."""
    _, _, A, B, C, D, _, delta_bias, initial_state, offsets = inputs
    return inputs._replace(
        A=A.contiguous(),
        B=B.contiguous() if B.dim() == 2 else B,
        C=C.contiguous() if C.dim() == 2 else C,
        D=None if D is None else D.contiguous(),
        delta_bias=None if delta_bias is None else delta_bias.contiguous(),
        initial_state=None if initial_state is None else initial_state.contiguous(),
        cu_seqlens=None if offsets is None else offsets.contiguous(),
    )


def saved_shape(inputs: Inputs) -> tuple[int, ...]:
    """The states before every CHUNK-th token of a row: (B, (L - 1) // CHUNK, D, N)."""
    batch, length, channels = inputs.u.shape
    return (batch, max(length - 1, 0) // CHUNK, channels, inputs.A.shape[1])


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out (B, L, D), the final states (B or S, D, N), and the states that `backward` starts from."""
    inputs = _contiguous(inputs)
    u, delta, A, B, C, D, z, delta_bias, initial, offsets = inputs
    batch, length, channels = u.shape
    call = _Call.of(inputs, options, plan_forward)
    pieces = call.plan.pieces
    out = u.new_empty(u.shape)
    final = A.new_empty(call.sequences, *A.shape)
    kept = A.new_empty(saved_shape(inputs))
    piece_state = A.new_empty(call.sequences, pieces, *A.shape) if pieces > 1 else None
    piece_time = A.new_empty(call.sequences, pieces, channels) if pieces > 1 else None
    parameters = _Forward(
        *map(_pointer, (u, delta, z, B, C, A, D, delta_bias, initial, offsets, out, final, kept, piece_state, piece_time)),
        *map(_strides, (u, delta, z, B, C, out)),
        length, channels, call.groups, call.sequences, pieces, kept.shape[1],
        offsets is not None and offsets.dtype == torch.int64, options.reverse,
    )  # fmt: skip
    blocks = call.plan.blocks(channels, call.groups) * call.sequences * pieces
    if pieces > 1:
        call.launch("forward.cu", "selective_scan_summary", blocks, parameters, 2 * THREADS)
        states = call.sequences * A.numel()
        call.launch("forward.cu", "selective_scan_hand_over", -(-states // THREADS), parameters)
    call.launch("forward.cu", "selective_scan_forward", blocks, parameters, 2 * THREADS)
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
    d_u, d_delta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    d_z = None if z is None else z.new_empty(z.shape)
    d_initial = None if initial is None else torch.empty_like(initial)

    lots = slots(call.plan, call.sequences, channels, groups, call.multiprocessors)
    parts = lots * pieces
    blocks = call.plan.blocks(channels, groups)

    def parts_of_map(x: Tensor, fixed: bool) -> Tensor:
        return A.new_empty((parts, *x.shape) if fixed else (blocks // groups, *x.shape))

    B_parts, C_parts = parts_of_map(B, call.kind.B_fixed), parts_of_map(C, call.kind.C_fixed)
    A_parts = A.new_empty(parts, *A.shape)
    D_parts = None if D is None else A.new_empty(parts, channels)
    bias_parts = None if delta_bias is None else A.new_empty(parts, channels)
    piece_grad = A.new_empty(call.sequences, pieces, *A.shape) if pieces > 1 else None
    piece_time = A.new_empty(call.sequences, pieces, channels) if pieces > 1 else None
    parameters = _Backward(
        *map(_pointer, (d_out, u, delta, z, B, C, A, D, delta_bias, initial, offsets, saved, d_final)),
        *map(_pointer, (d_u, d_delta, d_z, d_initial)),
        *map(_pointer, (B_parts, C_parts, A_parts, D_parts, bias_parts, piece_grad, piece_time)),
        *map(_strides, (d_out, u, delta, z, B, C, d_u)),
        length, channels, groups, batch, call.sequences, lots, pieces, saved.shape[1],
        offsets is not None and offsets.dtype == torch.int64, options.reverse,
    )  # fmt: skip
    if pieces > 1:
        call.launch("backward.cu", "selective_scan_backward_summary", blocks * parts, parameters)
        states = call.sequences * A.numel()
        call.launch("backward.cu", "selective_scan_backward_hand_over", -(-states // THREADS), parameters)
    call.launch("backward.cu", "selective_scan_backward", blocks * parts, parameters)

    sums = [(B_parts, B), (C_parts, C), (A_parts, A), (D_parts, D), (bias_parts, delta_bias)]
    d_B, d_C, d_A, d_D, d_bias = _sum(sums, call.device)
    return d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_bias, d_initial


def _sum(sums: list[tuple[Tensor | None, Tensor | None]], device: int) -> list[Tensor | None]:
    """Each (parts, ...) tensor summed over its parts, in the dtype of the tensor beside it."""
    totals = [None if x is None else x.new_empty(x.shape) for _, x in sums]
    jobs = (_Job * 5)()
    blocks = 0
    for job, (parts, _), total in zip(jobs, sums, totals, strict=True):
        if parts is not None and total is not None:
            job.parts, job.total = parts.data_ptr(), total.data_ptr()
            job.count, job.part_count, job.format = total.numel(), parts.shape[0], _FORMATS[total.dtype]
            blocks += -(-total.numel() // 256)
    kernel = nvrtc.kernel(_FOLDER / "sum.cu", "sum_parts", (), device)
    kernel((blocks, 1, 1), 256, _Sum(jobs), torch._C._cuda_getCurrentRawStream(device))
    return totals
