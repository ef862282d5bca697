"""How a matrix times few vectors is laid out over a GPU: a pure function of the matrix's sizes.

The vectors have no say, so that what is summed together does not depend on how many there are.

Legend: K inputs, N outputs. A tile is eight rows of the weight; a step is four vectors of 16 bytes of each of them.
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

_MOST_AHEAD = 8  # steps times tiles: each is a vector in a thread's registers
_MOST_SPLIT = 16
_WANTED_WARPS = 512  # four a multiprocessor on the largest GPUs; fewer have too little on its way from memory
_BLOCK_WARPS = 4  # of a block at least, where there are blocks enough
_WANTED_BLOCKS = 256
_MANY_TILES = 4096


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


def plan(outputs: int, inputs: int, itemsize: int) -> Plan:
    """The plan for a weight (N, K) of numbers of `itemsize` bytes.

    Example:
        >>> plan(3072, 768, itemsize=2)
        Plan(tiles=1, ahead=6, split=4, groups=1)
        >>> plan(80, 1536, itemsize=2)
        Plan(tiles=1, ahead=3, split=16, groups=1)
    """
    chosen = _plan(outputs, inputs, itemsize)
    return replace(chosen, **_overridden) if _overridden else chosen


@functools.lru_cache(1024)
def _plan(outputs: int, inputs: int, itemsize: int) -> Plan:
    all_tiles, steps = -(-outputs // TILE), -(-inputs * itemsize // STEP_BYTES)
    tiles = 2 if all_tiles >= _MANY_TILES else 1
    split = 1
    while split < _MOST_SPLIT and (
        steps > split * _MOST_AHEAD or (all_tiles * split < _WANTED_WARPS and steps > 2 * split)
    ):
        split *= 2
    ahead = min(-(-steps // split), _MOST_AHEAD // tiles)
    groups = 1
    while groups * split < _BLOCK_WARPS and all_tiles >= 2 * groups * tiles * _WANTED_BLOCKS:
        groups *= 2
    return Plan(tiles, ahead, split, groups)
