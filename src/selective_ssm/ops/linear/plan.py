"""How a matrix times few vectors is laid out over a GPU: a pure function of sizes.

The number of vectors has no say in `split`, but for whether it is above sixteen, so that what is summed together does
not depend on it.

Legend: M vectors, K inputs, N outputs. A tile is eight rows of the weight; a step is four vectors of 16 bytes of each.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from selective_ssm.ops.overrides import Overrides

TILE = 8
"""Rows."""
STEP_BYTES = 64
"""Of a row."""
PLACES = 16
"""That a block has for vectors; others go to further blocks."""
FEW = 8
"""Vectors for which half of the places serve."""

_WANTED_WARPS = 2048  # of all blocks: with what is on its way to so many, memory is busy
_MOST_SPLIT = 16
_MOST_ON_THEIR_WAY = 8  # tiles times steps: each is a vector in a thread's registers
_SIXTEENS = 8  # of vectors, at most; K is split for these where there are more than one
_VERY_FEW_TILES = 32  # a product is over soon after it began: the fewer warps a block has the sooner it begins
_TILES_IN_PAIRS = 1024  # there are teams enough if each takes two
_MANY_TILES, _SPLIT_OF_MANY, _SHARE_OF_MANY = 4096, 8, 3  # warps abound, and small blocks leave sooner
_MULTIPROCESSORS = 132  # of the largest GPUs
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


_overrides = Overrides()
overridden = _overrides.chosen
"""Plans have these fields while it lasts: for benchmarks."""


def plan(vectors: int, outputs: int, inputs: int, itemsize: int) -> Plan:
    """The plan for a weight (N, K) of numbers of `itemsize` bytes and M vectors.

    K is split until there are warps enough to keep memory busy, and as far as a warp still has a step. Where tiles are
    very few it is split only until a warp's loads are all on their way at once, where they are very many until it has
    three steps. A warp takes two tiles where there are many, and for more than eight vectors, since x is then more to
    read than a tile.

    Example:
        >>> plan(1, outputs=3072, inputs=768, itemsize=2)
        Plan(tiles=1, ahead=3, split=8, groups=1)
        >>> plan(1, outputs=8192, inputs=2048, itemsize=2)
        Plan(tiles=2, ahead=4, split=4, groups=1)
    """
    chosen = _plan(vectors, outputs, inputs, itemsize)
    return _overrides.apply(chosen)


@functools.lru_cache(1024)
def _plan(vectors: int, outputs: int, inputs: int, itemsize: int) -> Plan:
    all_tiles, steps = -(-outputs // TILE), -(-inputs * itemsize // STEP_BYTES)
    sixteens = -(-vectors // PLACES)
    is_in_pairs = _TILES_IN_PAIRS <= all_tiles < _MANY_TILES
    teams, split = (all_tiles if sixteens == 1 else _SIXTEENS * all_tiles) >> is_in_pairs, 1
    while 2 * split <= min(steps, _MOST_SPLIT) and not _is_split_enough(teams, split, steps):
        split *= 2
    is_wide = vectors > FEW and sixteens * all_tiles > _MULTIPROCESSORS
    tiles = 2 if is_in_pairs or is_wide else 1
    share = -(-steps // split)
    rounds = -(-share * tiles // _MOST_ON_THEIR_WAY)
    groups = 1
    while groups * split < _BLOCK_WARPS and all_tiles >= groups * tiles * _MULTIPROCESSORS:
        groups *= 2
    return Plan(tiles, -(-share // rounds), split, groups)


def _is_split_enough(teams: int, split: int, steps: int) -> bool:
    if teams >= _MANY_TILES:
        return split == _SPLIT_OF_MANY or steps <= _SHARE_OF_MANY * split
    if teams < _VERY_FEW_TILES:
        return steps <= _MOST_ON_THEIR_WAY * split
    return teams * split >= _WANTED_WARPS
