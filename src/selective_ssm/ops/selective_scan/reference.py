"""The selective scan in plain torch: the specification that every kernel is held against, on any device.

Legend: B batch, L length, D channels = G groups x P, N state, S sequences in a row, T steps in a segment, M segments.

The recurrence h_t = a_t h_{t-1} + b_t is linear, so a row is cut into M segments of T steps that run side by side:

1. each segment runs from a zero state, for its end state;
2. states are handed from segment to segment: a whole segment decays its incoming state by exp(A sum(dt));
3. each segment runs again from its true incoming state, and y_t = C_t h_t is read off.

Nothing is divided by a product of decays and no decays are multiplied up, so no exponential overflows. Segments are
worked off in blocks that fit a cache, hence no tensor holds the states of all L steps. Those at the segments' ends are
kept for the backward pass, which takes the same three steps, from the end, on g_t = C_t dy_t + a_{t+1} g_{t+1}.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.ops import sequences
from selective_ssm.ops.layouts import Layouts
from selective_ssm.ops.selective_scan.discretization import decay, exprel, exprel_derivative
from selective_ssm.ops.selective_scan.inputs import Inputs, Options, StepInputs
from selective_ssm.ops.selective_scan.operands import (
    STEPS,
    Operands,
    at,
    count_groups,
    grouped,
    spread,
    step_size,
    twice_real,
)
from selective_ssm.ops.slots import Slots


def forward(inputs: Inputs, options: Options, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out (B, L, D), the final states (B or S, D, N), and the states at the segments' ends for `backward`."""
    op = Operands.of(inputs, options)
    y = torch.empty_like(op.dt)
    ends = op.initial.new_empty(op.dt.shape[1], *op.initial.shape[1:])
    carry = op.initial[0]
    for block in op.blocks():
        exponent = op.dt[:, block] * op.A
        states = op.drive(block, exponent)
        _run(states, decay(exponent), op, block, carry)
        carry = states[-1, -1]
        ends[block] = states[-1]
        y[:, block] = op.read(states, block)
    out = _skip_and_gate(op.join(y), inputs.u, inputs.D, inputs.z).to(inputs.u.dtype)
    final = op.per_sequence(ends, op.segments.last, op.initial)
    return out, op.ungrouped_state(final), ends


def backward(
    d_out: Tensor, d_final: Tensor | None, saved: Tensor, inputs: Inputs, options: Options
) -> tuple[Tensor | None, ...]:
    """The gradients of the differentiable inputs, in their order and dtypes; None where there is no input."""
    op = Operands.of(inputs, options)
    u, _, A, B, C, D, z, delta_bias, initial_state, _ = inputs
    wide = op.step.dtype
    d_out = d_out.to(wide)
    d_y = d_out if z is None else d_out * F.silu(z.to(wide))
    d = _Gradients.of(op, d_y, d_final, saved)

    d_u, d_step = op.join(d.u), op.join(d.dt)
    d_D = d_z = None
    if D is not None:
        d_u += D.to(wide) * d_y
        d_D = (d_y * u.to(wide)).sum((0, 1)).to(D.dtype)
    if z is not None:
        y = _skip_and_gate(op.join(d.y), u, D, None)
        gate = z.to(wide).sigmoid()
        d_z = (d_out * y * gate * (1 + z.to(wide) * (1 - gate))).to(z.dtype)
    if options.delta_softplus:
        d_step *= torch.where(op.step > 20, 1, -torch.expm1(-op.step))  # 1 - exp(-softplus); softplus is linear above
    return (
        d_u.to(u.dtype),
        d_step.to(inputs.delta.dtype),
        op.ungrouped(d.A).to(A.dtype),
        _real_where(op.ungrouped_projection(d.B), B),
        _real_where(op.ungrouped_projection(d.C), C),
        d_D,
        d_z,
        None if delta_bias is None else d_step.sum((0, 1)).to(delta_bias.dtype),
        None if initial_state is None else op.ungrouped_state(d.initial).to(initial_state.dtype),
    )


def saved_shape(inputs: Inputs) -> tuple[int, ...]:
    """The shape of what `forward` keeps for `backward`: (M, B, N, G, P), a state for every STEPS tokens."""
    batch, length, channels = inputs.u.shape
    count = 1 if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
    groups = count_groups(inputs)
    return (sequences.count_segments(length, count, STEPS), batch, inputs.A.shape[1], groups, channels // groups)


def step(
    state: Tensor,
    inputs: StepInputs,
    options: Options,
    state_indices: Tensor | None,
    layouts: Layouts | None = None,
) -> Tensor:
    """One token: updates `state` (slots, D, N) in place and returns out (B, D)."""
    batch = len(inputs.u)
    B, C = (x.unsqueeze(1) if x.dim() == 2 and len(x) == batch else x for x in (inputs.B, inputs.C))
    inputs = inputs._replace(B=B, C=C)
    slots = Slots.of(state_indices, state)
    held = slots.take(state)
    out = _step(held, inputs, options)
    slots.put(state, held)
    return slots.blank(out)


def _step(state: Tensor, inputs: StepInputs, options: Options) -> Tensor:
    def per_channel(x: Tensor) -> Tensor:  # (B, G, N) -> (B, D, N), or what broadcasts to it
        return x if x.dim() == 2 or x.shape[1] == 1 else x.repeat_interleave(u.shape[-1] // x.shape[1], 1)

    u, delta, A, B, C, D, z, delta_bias = inputs
    dt = step_size(delta, delta_bias, options.delta_softplus)
    exponent = dt.unsqueeze(-1) * A
    drive = (dt * u).unsqueeze(-1) * per_channel(B)
    if options.discretization == "zoh":
        drive = drive * exprel(exponent)
    state.mul_(decay(exponent)).add_(drive)
    y = twice_real((state * per_channel(C)).sum(-1))
    return _skip_and_gate(y, u, D, z).to(u.dtype)


def _run(states: Tensor, decays: Tensor, op: Operands, block: slice, carry: Tensor) -> None:
    """Turns the drives of a block, in place, into its states; `carry` is the state before its first segment."""
    local = states[0, :-1]
    for t in range(1, len(states)):
        local = torch.addcmul(states[t, :-1], decays[t, :-1], local)
    segments = op.segments
    fresh = op.initial[segments.sequence[block]] if op.packed else None
    state = _hand_over(local, op.segment_decay(block), carry, segments.is_first[block], fresh)
    for t in range(len(states)):
        state = states[t].addcmul_(decays[t], state)


def _run_adjoint(adjoint: Tensor, decays: Tensor, op: Operands, block: slice, carry: Tensor, last: Tensor) -> Tensor:
    """The mirror image of `_run`: turns C dy of a block, in place, into the gradients of its states.

    `carry` is the gradient of the state after the block, `last` that of each sequence's final state. Returns the
    gradients of the states before the segments.
    """
    local = adjoint[-1, 1:]
    for t in reversed(range(len(adjoint) - 1)):
        local = torch.addcmul(adjoint[t, 1:], decays[t + 1, 1:], local)
    local = (local * decays[0, 1:]).flip(0)
    segments = op.segments
    fresh = last[segments.sequence[block]].flip(0) if op.packed else None
    is_fresh = segments.is_last[block].flip(0)
    adjoint[-1] += _hand_over(local, op.segment_decay(block).conj().flip(0), carry, is_fresh, fresh).flip(0)
    for t in reversed(range(len(adjoint) - 1)):
        adjoint[t].addcmul_(decays[t + 1], adjoint[t + 1])
    return adjoint[0] * decays[0]


def _hand_over(local: Tensor, decays: Tensor, carry: Tensor, is_fresh: Tensor, fresh: Tensor | None) -> Tensor:
    """What enters each of M segments, in the order they are visited.

    A segment that receives x hands on local + decay x; one that begins a sequence receives its entry of `fresh`.
    """
    received = []
    for i in range(len(decays)):
        if fresh is not None:
            carry = torch.where(is_fresh[i], fresh[i], carry)
        received.append(carry)
        if i < len(local):
            carry = torch.addcmul(local[i], decays[i], carry)
    return torch.stack(received)


@dataclass(frozen=True)
class _Gradients:
    """The gradients of the operands, each in its operand's layout, and the output y = C h computed again."""

    dt: Tensor
    u: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    initial: Tensor
    y: Tensor

    @classmethod
    def of(cls, op: Operands, d_y: Tensor, d_final: Tensor | None, ends: Tensor) -> _Gradients:
        d_y = spread(op.segments, d_y, op.A.shape[1]) * (2 if op.A.is_complex() else 1)  # y = 2 Re(C h)
        last = torch.zeros_like(op.initial)
        if d_final is not None:
            last = grouped(d_final.to(last.dtype), op.A.shape[1]).unsqueeze(1 if op.packed else 0)
        d = cls(*(torch.zeros_like(x) for x in (op.dt, op.u, op.A, op.B, op.C, op.initial, op.u)))
        before, d_before = op.before(ends), torch.empty_like(ends)
        carry = last[-1]
        for block in reversed(op.blocks()):
            exponent = op.dt[:, block] * op.A
            trail = exponent.new_empty(len(exponent) + 1, *exponent.shape[1:])  # of states; the first is before t = 0
            trail[0] = before[block]
            op.drive(block, exponent, out=trail[1:])
            decays = decay(exponent.clone() if op.zoh else exponent)
            for t in range(len(decays)):
                trail[t + 1].addcmul_(decays[t], trail[t])
            d.y[:, block] = op.read(trail[1:], block)
            _add_over(d.C, block, trail[1:].conj() * d_y[:, block])

            decays = torch.conj_physical(decays)
            adjoint = torch.conj_physical(at(op.C, block)) * d_y[:, block]
            d_before[block] = _run_adjoint(adjoint, decays, op, block, carry, last)
            carry = d_before[block][0]
            d._add_drive(op, block, adjoint, decays, exponent)
            d._add_decay(op, block, adjoint, decays, trail[:-1])
        d.initial.copy_(op.per_sequence(d_before, op.segments.first, last))
        return d

    def _add_drive(self, op: Operands, block: slice, adjoint: Tensor, decays: Tensor, exponent: Tensor) -> None:
        """Through b = dt B u (euler) or b = dt exprel(dt A) B u (zoh), for which db/ddt = exp(dt A) B u."""
        dt, u = op.dt[:, block], op.u[:, block]
        through_B = adjoint * at(op.B, block).conj()
        if op.zoh:
            self.dt[:, block] = u * _sum_state(through_B * decays)
            self.A.add_((through_B * exprel_derivative(exponent).conj() * (dt * dt * u)).sum((0, 1, 2)))
            gain = exprel(exponent).conj()
            self.u[:, block] = dt * _sum_state(through_B * gain)
            adjoint = adjoint * gain
        else:
            d_input = _sum_state(through_B)
            self.dt[:, block] = u * d_input
            self.u[:, block] = dt * d_input
        _add_over(self.B, block, adjoint * (dt * u))

    def _add_decay(self, op: Operands, block: slice, adjoint: Tensor, decays: Tensor, previous: Tensor) -> None:
        """Through exp(dt A) h_{t-1}; overwrites `decays`."""
        d_exponent = decays.mul_(previous.conj()).mul_(adjoint)
        self.dt[:, block] += _sum_state(d_exponent * op.A.conj())
        self.A.add_(d_exponent.mul_(op.dt[:, block]).sum((0, 1, 2)))


def _sum_state(x: Tensor) -> Tensor:
    """The gradient of something real that all N states share: (T, M, B, 1, G, P)."""
    return _real_part(x.sum(3, keepdim=True))


def _skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D u) SiLU(z)."""
    y = y if D is None else y + D.to(y.dtype) * u.to(y.dtype)
    return y if z is None else y * F.silu(z.to(y.dtype))


def _add_over(total: Tensor, block: slice, value: Tensor) -> None:
    """Adds a (T, M, B, N, G, P) gradient to that of B or C, summed over the axes which those are broadcast along."""
    part = at(total, block)
    part += value.sum_to_size(part.shape)


def _real_part(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


def _real_where(gradient: Tensor, like: Tensor) -> Tensor:
    """A real input's gradient is real, whatever the state; and it has an axis of groups only where the input has."""
    return (gradient if like.is_complex() else _real_part(gradient)).to(like.dtype).view(like.shape)
