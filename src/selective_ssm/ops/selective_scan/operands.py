"""What the recurrence of the selective scan is made of, in the precision and the layout of the computation.

Legend: B batch, L length, D channels = G groups x P, N state, S sequences in a row, T steps in a segment, M segments.

A tensor over time is (T, M, B, N, G, P), of which any axis after M may be 1: the last axis is long and contiguous, and
every map of a group of channels broadcasts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.ops import sequences
from selective_ssm.ops.selective_scan.discretization import decay, exprel
from selective_ssm.ops.selective_scan.inputs import Inputs, Options
from selective_ssm.ops.sequences import Order, Segments

STEPS = 16
BLOCK_ELEMENTS = 2**19  # states in flight at once: a few buffers of this size fit a processor's cache


@dataclass(frozen=True)
class Operands:
    """What the recurrence is made of, in the precision and the layout of the computation."""

    segments: Segments
    packed: bool
    zoh: bool
    step: Tensor  # (B, L, D) dt
    dt: Tensor  # (T, M, B, 1, G, P): the same, zero in the padding, which therefore leaves the state as it is
    u: Tensor  # (T, M, B, 1, G, P): zero in the padding
    A: Tensor  # (N, G, P)
    B: Tensor  # (T, M, B, N, G, 1), or (N, G, P) when time-invariant
    C: Tensor  # likewise
    initial: Tensor  # (S, B, N, G, P)

    @classmethod
    def of(cls, inputs: Inputs, options: Options) -> Operands:
        u, delta, A, B, C, _, _, delta_bias, initial_state, cu_seqlens = inputs
        step = step_size(delta, delta_bias, options.delta_softplus)
        packed = cu_seqlens is not None
        offsets = sequences.boundaries(u.shape[1], cu_seqlens, u.device)
        segments = sequences.cut(Order(offsets, options.reverse), u.shape[1], STEPS)
        groups = count_groups(inputs)
        if initial_state is None:
            initial_state = A.new_zeros(len(offsets) - 1 if packed else len(u), *A.shape)
        state_dtype = step.dtype.to_complex() if A.is_complex() else step.dtype
        return cls(
            segments=segments,
            packed=packed,
            zoh=options.discretization == "zoh",
            step=step,
            dt=spread(segments, step, groups),
            u=spread(segments, u.to(step.dtype), groups),
            A=grouped(A.to(state_dtype), groups),
            B=spread_projection(segments, B.to(state_dtype), groups),
            C=spread_projection(segments, C.to(state_dtype), groups),
            initial=grouped(initial_state.to(state_dtype), groups).unsqueeze(1 if packed else 0),
        )

    def blocks(self) -> list[slice]:
        """The segments in portions of about BLOCK_ELEMENTS states."""
        steps, count, batch = self.dt.shape[:3]
        size = max(1, BLOCK_ELEMENTS // (steps * batch * self.A.numel()))
        return [slice(i, min(i + size, count)) for i in range(0, count, size)]

    def drive(self, block: slice, exponent: Tensor, out: Tensor | None = None) -> Tensor:
        """b_t, what each step adds to the state."""
        drive = torch.mul(self.dt[:, block] * self.u[:, block], at(self.B, block), out=out)
        return drive.mul_(exprel(exponent)) if self.zoh else drive

    def segment_decay(self, block: slice) -> Tensor:
        """What is left of a state after a whole segment: exp(A sum(dt))."""
        return decay(self.dt[:, block].sum(0) * self.A)

    def read(self, states: Tensor, block: slice) -> Tensor:
        """y_t = C_t h_t summed over the state, twice the real part when it is complex."""
        return twice_real((states * at(self.C, block)).sum(3, keepdim=True))

    def before(self, ends: Tensor) -> Tensor:
        """The state that each segment starts from, given those at the segments' ends: (M, B, N, G, P)."""
        handed = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
        return torch.where(column(self.segments.is_first), self.initial[self.segments.sequence], handed)

    def per_sequence(self, at_segments: Tensor, segment: Tensor, if_empty: Tensor) -> Tensor:
        """(M, B, N, G, P) -> (S, B, N, G, P): what stands at one segment of each sequence."""
        return torch.where(column(self.segments.is_empty), if_empty, at_segments[segment])

    def join(self, x: Tensor) -> Tensor:
        """(T, M, B, 1, G, P) -> (B, L, D)."""
        return self.segments.join(x.squeeze(3).flatten(-2))

    def ungrouped(self, x: Tensor) -> Tensor:
        """(..., N, G, P) -> (..., D, N)."""
        return x.flatten(-2).transpose(-1, -2).contiguous()

    def ungrouped_state(self, x: Tensor) -> Tensor:
        """(S, B, N, G, P) -> (S or B, D, N): the caller's axis of sequences."""
        return self.ungrouped(x.squeeze(1 if self.packed else 0))

    def ungrouped_projection(self, x: Tensor) -> Tensor:
        """The inverse of laying out B or C: (B, L, G, N) or (D, N)."""
        if x.dim() == 3:
            return self.ungrouped(x)
        x = x.squeeze(-1).transpose(-1, -2)
        return self.segments.join(x.flatten(-2)).unflatten(-1, x.shape[-2:])


def step_size(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """softplus(delta + bias) in the precision of the computation: fp32, or float64 for float64 inputs."""
    raw = delta.to(torch.float64 if delta.dtype == torch.float64 else torch.float32)
    raw = raw if bias is None else raw + bias.to(raw.dtype)
    return F.softplus(raw) if softplus else raw


def spread(segments: Segments, x: Tensor, groups: int) -> Tensor:
    """(B, L, D) -> (T, M, B, 1, G, P), with zeros in the padding."""
    x = segments.spread(x).masked_fill_(segments.is_padding[..., None, None], 0)
    return x.unflatten(-1, (groups, -1)).unsqueeze(3)


def spread_projection(segments: Segments, x: Tensor, groups: int) -> Tensor:
    """(B, L, G, N) or (B, L, N) -> (T, M, B, N, G, 1), or the time-invariant (D, N) -> (N, G, P)."""
    if x.dim() == 2:
        return grouped(x, groups)
    x = x if x.dim() == 4 else x.unsqueeze(2)
    return segments.spread(x.flatten(2)).unflatten(-1, x.shape[2:]).transpose(-1, -2).contiguous().unsqueeze(-1)


def grouped(x: Tensor, groups: int) -> Tensor:
    """(..., D, N) -> (..., N, G, P)."""
    return x.transpose(-1, -2).contiguous().unflatten(-1, (groups, -1))


def count_groups(inputs: Inputs) -> int:
    """G, which B and C agree on where both have it."""
    B, C = inputs.B.shape, inputs.C.shape
    return max(B[2] if len(B) == 4 else 1, C[2] if len(C) == 4 else 1)


def at(x: Tensor, block: slice) -> Tensor:
    """The block's part of B or C, which may be time-invariant."""
    return x if x.dim() == 3 else x[:, block]


def column(mask: Tensor) -> Tensor:
    """(M,) or (S,) beside the axes (B, N, G, P)."""
    return mask[:, None, None, None, None]


def twice_real(x: Tensor) -> Tensor:
    """A sum over half of the conjugate pairs of states stands for the sum over all: twice its real part."""
    return 2 * x.real if x.is_complex() else x
