from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from selective_ssm.data.packing import Ints, JoinedRows, PackedRows, permutation

Lengths = st.lists(st.integers(1, 40), min_size=1, max_size=20)
Rows = st.integers(1, 30)
Seeds = st.integers(0, 3)


def layout(lengths: list[int]) -> tuple[Ints, Ints]:
    """Starts and lengths of documents in a stream with gaps, as held-out documents leave them."""
    sizes = np.array(lengths, np.int64)
    return np.cumsum(sizes + 3) - sizes, sizes


def positions(spans: Ints) -> list[int]:
    return [position for start, stop in spans.tolist() for position in range(start, stop)]


def all_positions(starts: Ints, lengths: Ints) -> list[int]:
    return positions(np.stack((starts, starts + lengths), axis=1))


@given(Lengths, Rows, Seeds, st.integers(0, 5))
def test_joined_rows_hold_every_token_once_an_epoch(lengths: list[int], row_length: int, seed: int, epoch: int) -> None:
    starts, sizes = layout(lengths)
    plan = JoinedRows(starts, sizes, row_length, seed)
    rows = [positions(plan.spans(epoch, place)) for place in range(len(plan))]
    assert sorted(position for row in rows for position in row) == all_positions(starts, sizes)
    assert sum(len(row) < row_length for row in rows) <= 1
    assert max(map(len, rows)) <= row_length


@given(Lengths, Rows, Seeds)
def test_joined_rows_leave_a_document_only_at_its_end(lengths: list[int], row_length: int, seed: int) -> None:
    starts, sizes = layout(lengths)
    plan = JoinedRows(starts, sizes, row_length, seed)
    ends = set((starts + sizes).tolist())
    for place in range(len(plan)):
        spans = plan.spans(0, place)
        assert (spans[:, 0] < spans[:, 1]).all()
        assert set(spans[:-1, 1].tolist()) <= ends
        assert set(spans[1:, 0].tolist()) <= set(starts.tolist())


def test_each_epoch_cuts_joined_rows_at_other_places() -> None:
    plan = JoinedRows(*layout([1000]), row_length=10, seed=0)
    cuts = {frozenset(int(plan.spans(epoch, place)[0, 0]) % 10 for place in range(100)) for epoch in range(5)}
    assert len(cuts) > 1


@given(Lengths, Rows, st.integers(1, 4), Seeds, st.integers(0, 5))
def test_packed_rows_hold_every_token_once_an_epoch(
    lengths: list[int], piece_length: int, pieces: int, seed: int, epoch: int
) -> None:
    starts, sizes = layout(lengths)
    plan = PackedRows(starts, sizes, piece_length, piece_length * pieces, seed)
    rows = [plan.spans(epoch, place) for place in range(len(plan))]
    found = sorted(position for row in rows for position in positions(row))
    assert found == all_positions(starts, sizes)
    assert max(len(positions(row)) for row in rows) <= piece_length * pieces
    # Only documents longer than a piece are cut, and never into more pieces than they must be.
    assert sum(map(len, rows)) == sum(-(-length // piece_length) for length in lengths)


@given(Lengths, st.integers(1, 4), Seeds)
def test_a_packed_row_is_left_only_when_the_next_piece_does_not_fit(lengths: list[int], pieces: int, seed: int) -> None:
    starts, sizes = layout(lengths)
    plan = PackedRows(starts, sizes, 10, 10 * pieces, seed)
    filled = [len(positions(plan.spans(0, place))) for place in range(len(plan))]
    assert sum(length <= 10 * pieces - 10 for length in filled) <= 1  # at most the row that was filled last


def test_epochs_and_seeds_differ() -> None:
    starts, sizes = layout([40] * 20)
    orders = set()
    for seed in range(3):
        joined, packed = JoinedRows(starts, sizes, 7, seed), PackedRows(starts, sizes, 10, 40, seed)
        for plan in (joined, packed):
            for epoch in range(3):
                first = tuple(positions(plan.spans(epoch, place))[0] for place in range(len(plan)))
                assert first == tuple(positions(plan.spans(epoch, place))[0] for place in range(len(plan)))
                orders.add(first)
    assert len(orders) == 18


def test_a_permutation_is_one_and_depends_on_seed_and_purpose() -> None:
    drawn = [permutation(50, *seed).tolist() for seed in ((0,), (1,), (0, 0), (0, 1), (0, 1, 0), (0, 1, 1))]
    assert all(sorted(order) == list(range(50)) for order in drawn)
    assert len(set(map(tuple, drawn))) == len(drawn)
