"""A state that grows: what is kept of every token of a text, for all tokens after it.

Legend: B batch, L length, S rows (one a sequence), T tokens that the longest row reads, C capacity.

Such a state is caches (S, C, …), zero past what a row has read, and after them the rows' lengths (S,) int64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.layers.mixer import State
from selective_ssm.ops import checks
from selective_ssm.ops.sequences import Order, covering
from selective_ssm.ops.slots import Slots


def empty_cache(
    batch: int, max_length: int | None, shapes: Iterable[Sequence[int]], device: torch.device, dtype: torch.dtype
) -> State:
    """The state before the first token: caches of `max_length` tokens, none by default, of these shapes each."""
    caches = (torch.zeros(batch, max_length or 0, *shape, device=device, dtype=dtype) for shape in shapes)
    return (*caches, torch.zeros(batch, device=device, dtype=torch.int64))


def visible(before: Tensor, first: int, last: int, keys: int) -> Tensor:
    """Which keys each query sees, (S, last - first, keys): those up to its own, as many as were `before` (S,) it."""
    query = before[:, None] + torch.arange(first, last, device=before.device)
    return torch.arange(keys, device=before.device) <= query[..., None]


@dataclass(frozen=True)
class Reading:
    """Where the tokens (B, L, …) of a forward pass stand: in which row, and after how many others.

    How many tokens there are in each row is looked at by the host, which waits for the device where rows have a past or
    are packed.
    """

    before: Tensor  # (S,) how many tokens each row has had
    after: Tensor  # (S,) how many it has then
    row: Tensor | None  # (L,) the row of each token of a pack; None where row b is row b
    position: Tensor  # (L,) each token's position among those that are read
    width: int  # T
    earlier: int  # the largest of `before`
    longest: int  # the largest of `after`

    @classmethod
    def of(cls, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> Reading:
        """How x (B, L, …) is read from a state, whose last tensor are the rows' lengths."""
        length = x.shape[1]
        if cu_seqlens is None:
            row, position = None, torch.arange(length, device=x.device)
            counts = torch.full((len(x),), length, device=x.device)
            width = length
        else:
            offsets = covering(cu_seqlens, length)
            row, position = Order(offsets, reverse=False).find(length)
            counts = offsets.diff()
            width = _host_max(counts)
        before = torch.zeros_like(counts) if state is None else state[-1]
        after = before + counts
        earlier, longest = (0, width) if state is None else (_host_max(before), _host_max(after))
        return cls(before, after, row, position, width, earlier, longest)

    def spread(self, x: Tensor) -> Tensor:
        """(B, L, …) -> (S, T, …), each sequence in a row of its own and zeros after it."""
        if self.row is None:
            return x
        rows = x.new_zeros(len(self.before), self.width, *x.shape[2:])
        return rows.index_put((self.row, self.position), x[0])

    def join(self, x: Tensor) -> Tensor:
        """(S, T, …) -> (B, L, …): undoes `spread`."""
        return x if self.row is None else x[self.row, self.position][None]

    def among(self, x: Tensor) -> Tensor:
        """(S, C, …) -> (B, L, …): what stands where `extend` puts the tokens that are read."""
        if self.row is None:
            row = torch.arange(len(x), device=x.device)[:, None]
            return x[row, self.before[:, None] + self.position]
        return x[self.row, self.before[self.row] + self.position][None]

    def extend(self, state: State | None, *tokens: Tensor) -> State:
        """The state after tokens (B, L, …), given for each cache; it has the room of the old one, or what they need."""
        caches = [None] * len(tokens) if state is None else state[:-1]
        return (*map(self._extend, caches, tokens), self.after)

    def _extend(self, cache: Tensor | None, x: Tensor) -> Tensor:
        if cache is None:
            return self.spread(x)
        more = max(self.longest - cache.shape[1], 0)
        roomy = F.pad(cache, (0, 0) * (cache.ndim - 2) + (0, more))
        if self.row is None:
            row = torch.arange(len(x), device=x.device)[:, None]
            return roomy.index_put((row, self.before[:, None] + self.position), x.to(cache.dtype))
        return roomy.index_put((self.row, self.before[self.row] + self.position), x[0].to(cache.dtype))


def append(state: State, before: Tensor, tokens: Sequence[Tensor], slots: Slots) -> list[Tensor]:
    """Write a token a row (B, …) into each cache, in place, after the tokens that were `before` (B,) it in its slot.

    Returns:
        The caches of the rows, (B, C', …): at least all that they hold now.

    Raises:
        UserError: a slot is full. Where its length cannot be read without waiting for the device, nothing is written
            into it instead.
    """
    *caches, lengths = state
    capacity = caches[0].shape[1]
    longest = checks.largest(before)
    if capacity == 0 or (longest is not None and longest >= capacity):
        raise UserError(f"the state has room for {capacity} tokens and is full: give init_state a larger max_length")
    has_room = slots.is_used & (before < capacity)
    places = (slots.index, before.clamp_max(capacity - 1))
    for cache, token in zip(caches, tokens, strict=True):
        slots.put_at(cache, places, token, has_room)
    slots.put(lengths, before + has_room)
    held = capacity if longest is None else longest + 1
    return [slots.take(cache[:, :held]) for cache in caches]


def _host_max(lengths: Tensor) -> int:
    return int(lengths.max()) if len(lengths) else 0
