"""Reading prompts: pieces of many, one after the other, in one pass of the model.

Legend: T tokens of a pack, P pieces in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch

from selective_ssm.generation.slots import Slots, pinned
from selective_ssm.models import LanguageModel

Piece = tuple[int, Sequence[int]]
"""A slot, and the ids to read there."""


class Size(NamedTuple):
    """How much a pack holds, padding and all."""

    tokens: int
    pieces: int


_TOKENS = tuple(256 << power for power in range(6))
_PIECES = (8, 32)
PADDED = tuple(Size(tokens, pieces) for tokens in _TOKENS for pieces in _PIECES)
"""What packs are padded to, for each size to have a graph of its own; larger ones keep a GPU busy without."""


def size_of(pieces: Sequence[Piece]) -> Size:
    """How much pieces take without padding."""
    return Size(sum(len(ids) for _, ids in pieces), len(pieces))


def padded(size: Size) -> Size | None:
    """The first of `PADDED` with room for so much and a piece of padding, if there is one.

    Example:
        >>> padded(Size(300, 2)), padded(Size(10000, 2))
        (Size(tokens=512, pieces=8), None)
    """
    return next((larger for larger in PADDED if larger.tokens >= size.tokens and larger.pieces > size.pieces), None)


class Pack:
    """Memory for pieces of prompts, which stays where it is.

    What they leave is read as one more piece, in the slot that is there for padding, and by pieces of no tokens.

    Args:
        size: how much it holds.
        slots: where is read.

    Attributes:
        ids: (1, T) int64.
        ends: (P + 1,) int64, the boundaries of the pieces.
        slots: (P,) int64, where each is read.
    """

    def __init__(self, size: Size, slots: Slots) -> None:
        self._size, self._padding = size, slots.count
        self._numbers = torch.empty(sum(size) + size.pieces + 1, dtype=torch.int64, device=slots.pending.device)
        ids, self.ends, self.slots = self._numbers.split([size.tokens, size.pieces + 1, size.pieces])
        self.ids = ids[None]

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Put pieces in, at most as much as there is room for; if less, then less than P."""
        tokens, count = self._size
        ids = list(chain.from_iterable(ids for _, ids in pieces))
        ends = [0, *accumulate(len(ids) for _, ids in pieces)]
        slots = [slot for slot, _ in pieces]
        left = count - len(pieces)
        numbers = [*ids, *[0] * (tokens - len(ids)), *ends, *[tokens] * left, *slots, *[self._padding] * left]
        self._numbers.copy_(pinned(numbers, self._numbers.device), non_blocking=True)


def read(model: LanguageModel, slots: Slots, pack: Pack) -> None:
    """Read on in some slots, all in one pass.

    It waits for nothing on the host and has fixed shapes.

    Args:
        model: what reads.
        slots: whose states go on.
        pack: what is read, and where.
    """
    ends = pack.ends if len(pack.slots) > 1 else None
    slots.state.put(pack.slots, model.read(pack.ids, slots.state.select(pack.slots), cu_seqlens=ends))
