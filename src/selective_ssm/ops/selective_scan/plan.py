"""How a scan is laid out over a GPU: pure functions of sizes.

Legend: a block serves 128 / lanes channels of one sequence; `lanes` neighbouring threads share a channel, each with
16 / lanes of 16 states. The more lanes, the more warps there are to hide each other's latencies, and the more
instructions a state costs (sums over lanes, loads that serve fewer states): so as few as fill the machine.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from selective_ssm.ops.overrides import Overrides

THREADS = 128
"""Of a block; of each of its two roles, forward."""
LANES = (2, 4, 8)
"""Threads that may share a channel."""
STATES = 16
CHUNK = 64
"""Tokens between two states that the forward pass keeps for the backward pass: at N = 16 a byte a token and channel."""
WARPS_A_MULTIPROCESSOR = 8
"""Two for each of a multiprocessor's four schedulers keep it busy."""


@dataclass(frozen=True)
class Plan:
    """How one pass over a scan is laid out.

    Args:
        lanes: threads that share a channel.
        pieces: into how many pieces each sequence is cut that run side by side. With more than one the recurrence is
            run twice: for the pieces' ends, then again from the states that these imply.
        threads: of a block, or of each of its roles.
    """

    lanes: int
    pieces: int
    threads: int = THREADS

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.threads // self.lanes

    @property
    def steps(self) -> int:
        """Tokens of a tile of the forward pass: one or two times 8 channels of a token for each helper."""
        return {2: 32, 4: 32, 8: 64}[self.lanes]

    @property
    def unrolled(self) -> int:
        """Tokens that the forward pass scans before it writes their sums."""
        return 32 if self.lanes == 8 else 16

    @property
    def blocks_a_multiprocessor(self) -> int:
        """For how many the forward pass leaves registers."""
        return 3 if self.lanes == 4 else 2

    def blocks(self, channels: int, groups: int) -> int:
        """Blocks for all channels; none straddles groups, whose maps differ."""
        return groups * -(-channels // groups // self.channels)


_FULL_ENOUGH = {2: 0.9, 4: 0.45}
"""The share of the warps wanted with which so many lanes a channel are still faster than twice as many."""

_overrides = Overrides()
overridden = _overrides.chosen
"""Plans have these fields while it lasts: for benchmarks."""


def plan_forward(sequences: int, length: int, channels: int, groups: int, multiprocessors: int) -> Plan:
    """The plan for so many sequences, B or those in a pack, with L tokens in a row.

    Example:
        >>> plan_forward(8, 2048, 2048, 1, 132)
        Plan(lanes=2, pieces=1, threads=128)
        >>> plan_forward(1, 2**20, 1, 1, 132)
        Plan(lanes=8, pieces=264, threads=128)
    """
    chosen = _plan_forward(sequences, length, channels, groups, multiprocessors)
    return _overrides.apply(chosen)


@functools.lru_cache(1024)
def _plan_forward(sequences: int, length: int, channels: int, groups: int, multiprocessors: int) -> Plan:
    wanted = WARPS_A_MULTIPROCESSOR * multiprocessors
    chosen = Plan(lanes=2, pieces=1)
    while chosen.lanes < 8 and _warps(chosen, sequences, channels, groups) < _FULL_ENOUGH[chosen.lanes] * wanted:
        chosen = replace(chosen, lanes=2 * chosen.lanes)
    if 4 * _warps(chosen, sequences, channels, groups) < wanted:  # running the recurrence twice pays from here on
        chosen = _in_pieces(chosen, sequences, length, channels, groups, wanted)
    return chosen


def plan_backward(
    sequences: int, length: int, channels: int, groups: int, multiprocessors: int, threads: int = THREADS
) -> Plan:
    """The same backward, where channels are held in one way only, that of tensor cores: 16 channels a warp.

    Half the threads serve where a block's shared memory is too small for all.
    """
    chosen = _plan_backward(sequences, length, channels, groups, multiprocessors, threads)
    return _overrides.apply(chosen, lanes=2)


@functools.lru_cache(1024)
def _plan_backward(sequences: int, length: int, channels: int, groups: int, multiprocessors: int, threads: int) -> Plan:
    wanted = WARPS_A_MULTIPROCESSOR * multiprocessors
    chosen = Plan(lanes=2, pieces=1, threads=threads)
    if 2 * _warps(chosen, sequences, channels, groups) < wanted:
        chosen = _in_pieces(chosen, sequences, length, channels, groups, wanted)
    return chosen


def _in_pieces(chosen: Plan, sequences: int, length: int, channels: int, groups: int, wanted: int) -> Plan:
    warps = _warps(chosen, sequences, channels, groups)
    return replace(chosen, pieces=max(1, min(wanted // warps, -(-length // CHUNK) // 4)))


def _warps(chosen: Plan, sequences: int, channels: int, groups: int) -> int:
    return sequences * chosen.blocks(channels, groups) * (chosen.threads // 32)


def slots(chosen: Plan, sequences: int, channels: int, groups: int, multiprocessors: int) -> int:
    """How many sequences of a pack are served side by side going backward; each slot keeps sums of its own."""
    wanted = 4 * WARPS_A_MULTIPROCESSOR * multiprocessors
    each = chosen.pieces * chosen.blocks(channels, groups) * (chosen.threads // 32)
    return min(sequences, -(-wanted // each))
