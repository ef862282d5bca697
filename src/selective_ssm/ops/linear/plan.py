"""How a matrix times few vectors is laid out over a GPU: a pure function of sizes.

The number of vectors has no say in `split`, so that what is summed together does not depend on it.

Legend: M vectors, K inputs, N outputs. A tile is eight rows of the weight; a step is four vectors of 16 bytes of each.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

TILE = 8
"""Rows."""
STEP_BYTES = 64
"""Of a row."""
PLACES = 16
"""That a block has for vectors; others go to further blocks."""
FEW = 8
"""Vectors for which half of the places serve."""

_MULTIPROCESSORS = 132  # of the largest GPUs
_STEPS_OF_ONE_TILE = (3, 4)  # of a warp; with fewer, or more, it takes two
_MOST_ON_THEIR_WAY = 8  # tiles times steps: each is a vector in a thread's registers
_MOST_SPLIT = 16
_MANY_TILES, _MOST_SPLIT_OF_MANY = 4096, 8  # there are warps enough, and smaller blocks leave sooner
_BLOCK_WARPS = 4  # of a block at least, where there are blocks enough


@dataclass(frozen=True)
class Plan:
    """How one product is laid out.

    Args:
        tiles: of a warp; what is read of x serves them all.
        ahead: steps that a thread has on their way from memory.
        split: warps that share tiles, each with a part of K.
        groups: teams of so many warps in a block.
    """

    tiles: int
    ahead: int
    split: int
    groups: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.split * self.groups

    @property
    def rows(self) -> int:
        """Of a block."""
        return TILE * self.tiles * self.groups


_overridden: dict[str, Any] = {}


@contextlib.contextmanager
def overridden(**fields: Any) -> Generator[None]:
    """Plans have these fields while it lasts: for benchmarks."""
    before = dict(_overridden)
    _overridden.update(fields)
    try:
        yield
    finally:
        _overridden.clear()
        _overridden.update(before)


def plan(vectors: int, outputs: int, inputs: int, itemsize: int) -> Plan:
    """The plan for a weight (N, K) of numbers of `itemsize` bytes and M vectors.

    K is split until a warp has at most three steps of it; a thread's few loads are then all on their way at once. Where
    steps are fewer still, or cannot be made as few, a warp takes two tiles, if there are tiles enough. So it does for
    more than eight vectors, since x is then more to read than a tile.

    Example:
        >>> plan(1, outputs=3072, inputs=768, itemsize=2)
        Plan(tiles=1, ahead=3, split=8, groups=1)
        >>> plan(1, outputs=2048, inputs=4096, itemsize=2)
        Plan(tiles=2, ahead=4, split=16, groups=1)
    """
    chosen = _plan(vectors, outputs, inputs, itemsize)
    return replace(chosen, **_overridden) if _overridden else chosen


@functools.lru_cache(1024)
def _plan(vectors: int, outputs: int, inputs: int, itemsize: int) -> Plan:
    all_tiles, steps = -(-outputs // TILE), -(-inputs * itemsize // STEP_BYTES)
    has_many = all_tiles >= _MANY_TILES
    split = 1
    while steps > 3 * split and split < (_MOST_SPLIT_OF_MANY if has_many else _MOST_SPLIT):
        split *= 2
    share = -(-steps // split)
    wants_two = vectors > FEW or not (has_many or share in _STEPS_OF_ONE_TILE)
    tiles = 2 if wants_two and -(-vectors // PLACES) * all_tiles > _MULTIPROCESSORS else 1
    rounds = -(-share * tiles // _MOST_ON_THEIR_WAY)
    groups = 1
    while groups * split < _BLOCK_WARPS and all_tiles >= groups * tiles * _MULTIPROCESSORS:
        groups *= 2
    return Plan(tiles, -(-share // rounds), split, groups)
