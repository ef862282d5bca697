"""How documents become rows: joined end to end and cut, or packed beside one another with known bounds.

Both plans speak of a stream of tokens in which every document is its boundary followed by its tokens, and one more
boundary stands at the very end. So the targets of ``stream[start:stop]`` are ``stream[start + 1 : stop + 1]``, and a
document's last target is the boundary of whatever follows it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def random_bits(count: int, seed: int, *purpose: int) -> NDArray[np.uint64]:
    """Random 64-bit numbers; numpy keeps these the same in every version, which it does not promise of a shuffle."""
    return np.random.PCG64(np.random.SeedSequence(seed, spawn_key=purpose)).random_raw(count)


def permutation(count: int, seed: int, *purpose: int) -> NDArray[np.intp]:
    """The numbers 0 … count - 1 in an order drawn from the seed."""
    return np.argsort(random_bits(count, seed, *purpose), kind="stable")


@lru_cache(maxsize=4)
def _order_of_epoch(count: int, seed: int, epoch: int) -> NDArray[np.intp]:
    return permutation(count, seed, 1, epoch)


class JoinedRows:
    """Documents set end to end in an order drawn from the seed, and cut into rows.

    Each epoch goes once around the same circle of documents, starts elsewhere, so that it cuts at other places, and
    takes its rows in an order of its own. One of them holds what is left over and may be shorter.

    Args:
        starts: where each document begins in the stream, int64.
        lengths: how many tokens each has, its boundary included, int64.
        row_length: tokens in a row.
        seed: of all that is drawn.
    """

    def __init__(self, starts: Ints, lengths: Ints, row_length: int, seed: int) -> None:
        order = np.tile(permutation(len(starts), seed, 0), 2)  # two rounds, so that no row has to turn back
        self._bounds = np.concatenate(([0], np.cumsum(lengths[order])))
        self._to_stream = starts[order] - self._bounds[:-1]
        self._total = int(lengths.sum())
        self._row_length = row_length
        self._seed = seed

    def __len__(self) -> int:
        """Rows in an epoch."""
        return -(-self._total // self._row_length)

    def spans(self, epoch: int, place: int) -> Ints:
        """The (start, stop) of the stretches of the stream that make up a row, in order."""
        start_of_epoch = int(random_bits(1, self._seed, 2, epoch)[0]) % self._total
        row = int(_order_of_epoch(len(self), self._seed, epoch)[place])
        begin, end = row * self._row_length, min((row + 1) * self._row_length, self._total)
        begin, end = start_of_epoch + begin, start_of_epoch + end
        first = int(np.searchsorted(self._bounds, begin, side="right")) - 1
        last = int(np.searchsorted(self._bounds, end, side="left"))
        cuts = np.clip(self._bounds[first : last + 1], begin, end)
        return np.stack((cuts[:-1], cuts[1:]), axis=1) + self._to_stream[first:last, None]


class PackedRows:
    """Whole documents, cut only where longer than the piece length, set into rows one after another as they fit.

    The seed draws the order in which they are set, each epoch takes the rows in an order of its own.

    Args:
        starts: where each document begins in the stream, int64.
        lengths: how many tokens each has, its boundary included, int64.
        piece_length: tokens in the longest piece.
        row_length: tokens that a row can hold, at least ``piece_length``.
        seed: of all that is drawn.
    """

    def __init__(self, starts: Ints, lengths: Ints, piece_length: int, row_length: int, seed: int) -> None:
        pieces = _pieces(starts, lengths, piece_length)
        self._pieces = pieces[permutation(len(pieces), seed, 0)]
        self._bounds = _next_fit(self._pieces[:, 1] - self._pieces[:, 0], row_length)
        self._seed = seed

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self._bounds) - 1

    def spans(self, epoch: int, place: int) -> Ints:
        """The (start, stop) of the pieces of the stream that make up a row, each a sequence of its own."""
        row = int(_order_of_epoch(len(self), self._seed, epoch)[place])
        return self._pieces[self._bounds[row] : self._bounds[row + 1]]


def _pieces(starts: Ints, lengths: Ints, piece_length: int) -> Ints:
    counts = -(-lengths // piece_length)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    piece_starts = np.repeat(starts, counts) + within * piece_length
    piece_stops = np.minimum(piece_starts + piece_length, np.repeat(starts + lengths, counts))
    return np.stack((piece_starts, piece_stops), axis=1)


def _next_fit(sizes: Ints, capacity: int) -> list[int]:
    """Where to part a list of sizes, each at most the capacity, into runs whose sums do not exceed it."""
    filled = np.cumsum(sizes)
    bounds = [0]
    while bounds[-1] < len(sizes):
        before = int(filled[bounds[-1] - 1]) if bounds[-1] else 0
        bounds.append(int(np.searchsorted(filled, before + capacity, side="right")))
    return bounds
