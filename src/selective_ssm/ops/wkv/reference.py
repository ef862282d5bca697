"""RWKV's average and its gradients in plain torch, in parallel over the length: the specification of the kernels.

Sequences are cut into segments of sixteen steps that run side by side; what a segment hands on is found by doubling:
after n rounds each has what 2^n of them before it leave.

Legend: B batch, L length, D channels, S sequences, T steps in a segment, M segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selective_ssm.ops import sequences
from selective_ssm.ops.sequences import Order, Segments
from selective_ssm.ops.wkv.inputs import Gradients, Inputs
from selective_ssm.ops.wkv.sums import NOTHING, Sums

_STEPS = 16


def forward(inputs: Inputs, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns y (B, L, D), the end state (B or S, 3, D) and, to `save`, the sums before each token and that state."""
    k, v, fade, bonus, state, cu_seqlens = inputs
    tokens = Sums.of(k.to(state.dtype), v.to(state.dtype))
    past, end = _sums(tokens, fade, Sums(*state.unbind(1)), cu_seqlens, reverse=False)
    y = past.and_of(tokens.faded(-bonus)).mean()
    end = torch.stack(end, 1)
    saved = torch.cat([torch.stack(past, 2).flatten(0, 1), end]) if save else None
    return y.to(k.dtype), end, saved


def saved_shape(inputs: Inputs) -> tuple[int, ...]:
    """Three numbers of each channel, for every token and every sequence."""
    batch, length, channels = inputs.k.shape
    return batch * length + inputs.state.shape[0], 3, channels


def backward(d_y: Tensor, d_end: Tensor | None, saved: Tensor, inputs: Inputs) -> Gradients:
    """The gradients of k, v, fade, bonus and state, as `op` derives them."""
    k, v, fade, bonus, state, cu_seqlens = inputs
    tokens, initial = Sums.of(k.to(state.dtype), v.to(state.dtype)), Sums(*state.unbind(1))
    past, end = saved.split([k.shape[0] * k.shape[1], len(state)])
    past = Sums(*past.unflatten(0, k.shape[:2]).unbind(2))
    seen = past.and_of(tokens.faded(-bonus))
    y, slope = seen.mean(), d_y.to(state.dtype) / seen.weights
    d_end = torch.zeros_like(state) if d_end is None else d_end
    to_come = Sums(-end[:, 0], d_end[:, 1], d_end[:, 2])
    future, first = _sums(Sums(-seen.top, slope, -slope * y), fade, to_come, cu_seqlens, reverse=True)

    own = torch.exp(tokens.top + bonus - seen.top) * slope
    d_bonus = own * (tokens.values - y)
    d_k = tokens.times(future) + d_bonus
    d_v = torch.exp(tokens.top + future.top) * future.values + own
    d_fade = -past.faded(fade).times(future)
    unit = torch.exp(initial.top + first.top)
    d_state = torch.stack([initial.times(first), unit * first.values, unit * first.weights], 1)
    if cu_seqlens is not None:
        is_empty = sequences.boundaries(k.shape[1], cu_seqlens, k.device).diff() == 0
        d_state = torch.where(is_empty[:, None, None], d_end, d_state)
    return d_k.to(k.dtype), d_v.to(v.dtype), d_fade.sum((0, 1)), d_bonus.sum((0, 1)), d_state


def _sums(added: Sums, fade: Tensor, initial: Sums, cu_seqlens: Tensor | None, *, reverse: bool) -> tuple[Sums, Sums]:
    """What stands before each token (B, L, D) is added, fading from token to token, and what is left (B or S, D).

    In reverse a sequence is visited from its last token, and what stands before a token is of those that follow it.
    """
    length, device = added.top.shape[1], fade.device
    order = Order(sequences.boundaries(length, cu_seqlens, device), reverse=reverse, is_row=cu_seqlens is None)
    segments = sequences.cut(order, length, _STEPS)
    initial = initial.each(lambda part: part[None] if cu_seqlens is None else part[:, None])  # (S, B, D)
    within, ends = _within(added.each(segments.spread), fade, segments)
    received, handed = _handed_on(ends, fade, initial, segments)
    age = fade * torch.arange(_STEPS, device=device)[:, None, None, None]
    final = initial.where(segments.is_empty[:, None, None], handed.at(segments.last))
    return received.faded(age).and_of(within).each(segments.join), final.each(lambda part: part.flatten(0, 1))


def _within(added: Sums, fade: Tensor, segments: Segments) -> tuple[Sums, Sums]:
    """The sums before each step and after the last of all segments, as if nothing had been before them."""
    none = torch.zeros_like(added.top[0])
    now = Sums(none + NOTHING, none, none)
    before: list[Sums] = []
    for step, is_padding in enumerate(segments.is_padding):
        before.append(now)
        now = now.where(is_padding[:, None, None], now.faded(fade).and_of(added.at(step)))
    return Sums(*map(torch.stack, zip(*before, strict=True))), now


def _handed_on(ends: Sums, fade: Tensor, initial: Sums, segments: Segments) -> tuple[Sums, Sums]:
    """What each segment receives and what it leaves, both (M, B, D)."""
    is_first = segments.is_first[:, None, None]
    own, age = initial.at(segments.sequence), fade * (~segments.is_padding).sum(0)[:, None, None]
    left = own.faded(age).and_of(ends).where(is_first, ends)
    age = torch.where(is_first, torch.inf, age)
    reach = 1
    while reach < len(age):
        further = left.at(slice(-reach)).faded(age[reach:]).and_of(left.at(slice(reach, None)))
        # What fades for ever is left out by hand: zero times what is not a number is not a number.
        further = further.where(age[reach:].isfinite(), left.at(slice(reach, None)))
        left = _after(left.at(slice(reach)), further)
        age = torch.cat([age[:reach], age[reach:] + age[:-reach]])
        reach *= 2
    return own.where(is_first, _after(left.at(slice(1)), left.at(slice(-1)))), left


def _after(first: Sums, rest: Sums) -> Sums:
    """One row of segments after another."""
    return Sums(*(torch.cat(parts) for parts in zip(first, rest, strict=True)))
