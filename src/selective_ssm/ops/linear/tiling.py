"""How a matrix times many vectors is laid out over a GPU: a pure function of sizes.

The number of vectors has no say in `split`, so that what is summed together does not depend on it.

Legend: M vectors, K inputs, N outputs.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from selective_ssm.ops.overrides import Overrides

_MULTIPROCESSORS = 132  # of the largest GPUs
_VECTORS, _ROWS = (16, 32, 64, 128), (16, 24, 32, 48, 64)  # of a block
_WARPS = 4  # of a block, where its vectors suffice
_TEAM_VECTORS = (16, 64)  # at least, as a product of matrices has; at most, so that sums fit a thread's registers
_DEPTHS = (64, 128)
_MOST_SHARED = 98304  # bytes that leave room for a block of the kernel before or after
_STAGES = (3, 8)  # at least, where that is possible, and at most


@dataclass(frozen=True)
class Tiling:
    """How one product is laid out.

    Args:
        vectors: of a block.
        rows: of the weight, of a block.
        depth: numbers of K that it takes of them at a time.
        stages: so many times as much lies in shared memory.
        teams: of warps; each has a part of the vectors.
        split: warps of a team; each has a part of K.
    """

    vectors: int
    rows: int
    depth: int
    stages: int
    teams: int
    split: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.teams * self.split

    @property
    def shared(self) -> int:
        """Bytes of shared memory: those of the stages, and in their place the sums of all warps afterwards."""
        pitch = self.rows if self.rows % 16 == 8 else self.rows + 8  # as in many.cu
        sums = 4 * self.split * self.vectors * pitch
        return max(self.stages * _stage_bytes(self.vectors, self.rows, self.depth), sums)


_overrides = Overrides()
overridden = _overrides.chosen
"""Tilings have these fields while it lasts: for benchmarks."""


def tiling(vectors: int, outputs: int, inputs: int) -> Tiling:
    """The tiling for a weight (N, K) of 16-bit numbers and M vectors.

    A block reads as many rows of both as it has of them, and a multiprocessor one block after another: the tile is
    that with which it reads least.

    Example:
        >>> tiling(128, outputs=3072, inputs=768)
        Tiling(vectors=64, rows=48, depth=128, stages=3, teams=2, split=2)
        >>> tiling(128, outputs=768, inputs=1536)
        Tiling(vectors=32, rows=24, depth=128, stages=6, teams=1, split=4)
    """
    chosen = _tiling(vectors, outputs, inputs)
    return _overrides.apply(chosen)


@functools.lru_cache(1024)
def _tiling(vectors: int, outputs: int, inputs: int) -> Tiling:
    def lines_read(tile: tuple[int, int]) -> int:
        blocks = -(-vectors // tile[0]) * -(-outputs // tile[1])
        return -(-blocks // _MULTIPROCESSORS) * sum(tile)

    split = 4 if inputs > outputs else 2  # where there are few rows blocks are small, and sums take long
    most_teams = _WARPS // split
    possible = (each for each in _VECTORS if each <= most_teams * _TEAM_VECTORS[1])
    tile_vectors, rows = min(itertools.product(possible, _ROWS), key=lines_read)
    teams = min(most_teams, tile_vectors // _TEAM_VECTORS[0])
    fits = inputs > _DEPTHS[0] and _STAGES[0] * _stage_bytes(tile_vectors, rows, _DEPTHS[1]) <= _MOST_SHARED
    depth = _DEPTHS[fits or split == 4]
    stages = min(_MOST_SHARED // _stage_bytes(tile_vectors, rows, depth), -(-inputs // depth) + 1, _STAGES[1])
    return Tiling(tile_vectors, rows, depth, stages, teams, split)


def _stage_bytes(vectors: int, rows: int, depth: int) -> int:
    return 2 * (vectors + rows) * depth
