"""How a convolution is laid out over a GPU: a pure function of sizes.

A thread owns some neighbouring channels, which move as one vector, and a run of consecutive tokens. Its registers hold
the filter and the last inputs of each of its channels; backward also the filter's gradient and the last gradients.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

THREADS = 128
"""Threads of a block."""

_VECTOR_BYTES = 16
_NUMBERS = 40  # of the filter, and of its gradient, that fit a thread's registers beside the rest
_WANTED_THREADS = (2**18, 2**17)  # forward and backward: some three times what an H200 holds at once
_RUNS = (8, 64)  # the shortest: each reads again the K - 1 inputs before it; the longest of short filters
_MIN_BLOCKS = {4: (8, 4), 3: (64, 16)}
"""For how many blocks registers are left, up to which width, forward and backward; with 3 a wider one spills them."""


class Plan(NamedTuple):
    """How one pass over a convolution is laid out."""

    channels: int  # of a thread
    unroll: int  # tokens that a thread has on their way from memory at once
    min_blocks: int  # that a multiprocessor must be able to hold
    lanes: int  # threads of a block that lie side by side along the channels; the others are further along the tokens
    run: int  # tokens of a thread
    columns: int  # blocks along the channels
    tiles: int  # blocks along a row's tokens


@functools.lru_cache(maxsize=4096)
def plan(batch: int, length: int, channels: int, width: int, itemsize: int, aligned: bool, backward: bool) -> Plan:
    """The plan for x of shape (B, L, D) = (batch, length, channels) and K = width.

    Args:
        batch: B.
        length: L.
        channels: D.
        width: K.
        itemsize: bytes of a number of x.
        aligned: whether every row of every tensor begins at a multiple of 16 bytes.
        backward: which of the two passes.

    Example:
        >>> plan(8, 4096, 2048, 4, 2, aligned=True, backward=False)
        Plan(channels=8, unroll=4, min_blocks=4, lanes=32, run=32, columns=8, tiles=32)
    """
    kept = 2 * width + 2 if backward else width + 1
    own = _VECTOR_BYTES // itemsize if aligned else 1
    while own > 1 and own * kept > _NUMBERS:
        own //= 2
    vectors = -(-channels // own)
    shortest, longest = _RUNS
    run = _power_of_two(batch * length * vectors // _WANTED_THREADS[backward])
    run = min(max(run, shortest), max(longest, _power_of_two(2 * width)))
    runs = min(4, _power_of_two(-(-length // run)))
    lanes = min(THREADS // runs, _power_of_two(vectors))
    return Plan(
        channels=own,
        unroll=min(4 if backward else 8, (32 if backward else 64) // (own * itemsize)),
        min_blocks=next((blocks for blocks, widest in _MIN_BLOCKS.items() if width <= widest[backward]), 2),
        lanes=lanes,
        run=run,
        columns=-(-vectors // lanes),
        tiles=-(-length // (run * (THREADS // lanes))),
    )


def _power_of_two(x: int) -> int:
    """The smallest that is at least x."""
    return 1 << max(x - 1, 0).bit_length()
