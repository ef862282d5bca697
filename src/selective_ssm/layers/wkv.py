"""RWKV's average over the past: a softmax whose logits fall with age, in parallel over the length or token by token.

Legend: B batch, L length, D channels, S sequences, T steps in a segment, M segments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from selective_ssm.ops import sequences
from selective_ssm.ops.sequences import Order, Segments
from selective_ssm.ops.slots import Slots

_STEPS = 16
_NOTHING = -1e30
"""The logarithm of no weight at all, of which differences can be taken."""


class Average(NamedTuple):
    """Values and their weights, summed, in units of e^top: as large as it may be, nothing overflows.

    Attributes:
        top: the logarithm of the unit.
        values: the weighted sum of values.
        weights: the sum of weights.
    """

    top: Tensor
    values: Tensor
    weights: Tensor

    @classmethod
    def of(cls, logit: Tensor, value: Tensor) -> Average:
        """One value, of weight e^logit."""
        return cls(logit, value, torch.ones_like(value))

    def faded(self, by: Tensor) -> Average:
        """The same with all weights times e^-by."""
        return self._replace(top=self.top - by)

    def and_of(self, other: Average) -> Average:
        """Both sums together.

        The unit is no part of what is differentiated: it cancels.
        """
        top = torch.maximum(self.top, other.top).detach()
        mine, theirs = torch.exp(self.top - top), torch.exp(other.top - top)
        values = mine * self.values + theirs * other.values
        return Average(top, values, mine * self.weights + theirs * other.weights)

    def where(self, condition: Tensor, other: Average) -> Average:
        """This one where the condition holds, and the other elsewhere."""
        return Average(*(torch.where(condition, mine, theirs) for mine, theirs in zip(self, other, strict=True)))

    def at(self, index: int | slice | Tensor) -> Average:
        """The entries of that index."""
        return Average(*(part[index] for part in self))

    def mean(self) -> Tensor:
        """The average itself."""
        return self.values / self.weights


def no_average(batch: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The state before the first token: (B, 3, D), an `Average` of nothing, in fp32 at least."""
    state = torch.zeros(batch, 3, width, device=device, dtype=torch.promote_types(dtype, torch.float32))
    state[:, 0] = _NOTHING
    return state


def wkv(
    k: Tensor, v: Tensor, fade: Tensor, bonus: Tensor, state: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Average v over each token's past, and the token itself.

        y_t = (Σ_{i<t} e^{k_i - (t-1-i) fade} v_i + e^{k_t + bonus} v_t) / (the same with 1 for v)

    Sequences are cut into segments of sixteen steps that run side by side; what a segment hands on is found by
    doubling: after n rounds each has what 2^n of them before it leave.

    Args:
        k: (B, L, D), logarithms of weights.
        v: (B, L, D).
        fade: (D,), by how much logarithms of weights fall a token; 0 or more.
        bonus: (D,), by how much a token's own is above what it will be.
        state: (B, 3, D), or (S, 3, D) where sequences are packed: what came before, as `no_average` makes it.
        cu_seqlens: (S + 1,) boundaries of packed sequences; B is 1 then.

    Returns:
        y (B, L, D), and the state after the last token of each sequence.

    Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048), section 3.1.2, and the
        recurrence in appendix D.

    Example:
        >>> k, v = torch.zeros(1, 3, 1), torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> nothing = no_average(1, 1, k.device, k.dtype)
        >>> wkv(k, v, torch.zeros(1), torch.zeros(1), nothing)[0].flatten().tolist()
        [1.0, 1.5, 2.0]
    """
    if k.shape[1] == 0:
        return v, state.clone()
    order = Order(sequences.boundaries(k.shape[1], cu_seqlens, k.device), reverse=False)
    segments = sequences.cut(order, k.shape[1], _STEPS)
    initial = Average(*(state[None] if cu_seqlens is None else state[:, None]).unbind(2))  # (S, B, D) each
    tokens = Average.of(segments.spread(k), segments.spread(v))
    before, ends = _within(tokens, fade, segments)
    received, handed = _handed_on(ends, fade, initial, segments)
    age = fade * torch.arange(_STEPS, device=fade.device)[:, None, None, None]
    mean = received.faded(age).and_of(before).and_of(tokens.faded(-bonus)).mean()
    final = initial.where(segments.is_empty[:, None, None], handed.at(segments.last))
    return segments.join(mean), torch.stack([part.flatten(0, 1) for part in final], 1)


def wkv_step(
    k: Tensor, v: Tensor, fade: Tensor, bonus: Tensor, state: Tensor, state_indices: Tensor | None = None
) -> Tensor:
    """One token a row: as `wkv`, with k, v and the result (B, D); the state (slots, 3, D) is updated in place."""
    slots = Slots.named(state_indices, len(k), state)
    before, token = Average(*slots.take(state).unbind(1)), Average.of(k, v)
    y = before.and_of(token.faded(-bonus)).mean()
    slots.put(state, torch.stack(before.faded(fade).and_of(token), 1))
    return y


def _within(tokens: Average, fade: Tensor, segments: Segments) -> tuple[Average, Average]:
    """The averages before each step and after the last of all segments, as if nothing had been before them."""
    none = torch.zeros_like(tokens.top[0])
    now = Average(none + _NOTHING, none, none)
    before: list[Average] = []
    for step, is_padding in enumerate(segments.is_padding):
        before.append(now)
        now = now.where(is_padding[:, None, None], now.faded(fade).and_of(tokens.at(step)))
    return Average(*map(torch.stack, zip(*before, strict=True))), now


def _handed_on(ends: Average, fade: Tensor, initial: Average, segments: Segments) -> tuple[Average, Average]:
    """What each segment receives and what it leaves, both (M, B, D)."""
    is_first = segments.is_first[:, None, None]
    own, age = initial.at(segments.sequence), fade * (~segments.is_padding).sum(0)[:, None, None]
    left = own.faded(age).and_of(ends).where(is_first, ends)
    age = torch.where(is_first, torch.inf, age)
    reach = 1
    while reach < len(age):
        further = left.at(slice(-reach)).faded(age[reach:]).and_of(left.at(slice(reach, None)))
        left = _after(left.at(slice(reach)), further)
        age = torch.cat([age[:reach], age[reach:] + age[:-reach]])
        reach *= 2
    return own.where(is_first, _after(left.at(slice(1)), left.at(slice(-1)))), left


def _after(first: Average, rest: Average) -> Average:
    """One row of segments after another."""
    return Average(*(torch.cat(parts) for parts in zip(first, rest, strict=True)))
