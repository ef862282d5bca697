"""Rows that name slots, with padding among them, in plain torch."""

from __future__ import annotations

import pytest
import torch

from selective_ssm.ops.slots import Slots


def test_padding_writes_nothing_of_its_own() -> None:
    state = torch.arange(8.0).view(4, 2)
    slots = Slots.named(torch.tensor([-1, 3, -7, 0], dtype=torch.int32), 4, state)
    assert slots.take(state)[[1, 3]].tolist() == [[6, 7], [0, 1]]
    slots.put(state, torch.tensor([[90.0, 91], [60, 61], [80, 81], [10, 11]]))
    assert state.tolist() == [[10, 11], [2, 3], [4, 5], [60, 61]]


def test_nothing_but_padding_writes_nothing() -> None:
    state = torch.arange(3.0)
    Slots.named(torch.tensor([-1, -1]), 2, state).put(state, torch.tensor([7.0, 8.0]))
    assert state.tolist() == [0, 1, 2]


def test_rows_in_order_are_the_state_itself() -> None:
    state = torch.zeros(2, 3)
    slots = Slots.named(None, 2, state)
    assert slots.take(state) is state
    slots.put(state, torch.ones(2, 3))
    assert state.all()


def test_slots_that_are_none_are_refused() -> None:
    state = torch.zeros(2)
    with pytest.raises(ValueError, match="the state has 2 slots for 3 rows; give state_indices"):
        Slots.named(None, 3, state)
    with pytest.raises(ValueError, match="a different slot for each row"):
        Slots.named(torch.tensor([1, 1]), 2, state)


def test_what_padding_gives_is_zero() -> None:
    state = torch.arange(3.0)
    for indices, expected in (([2, -1, 0], [1.0, 0.0, 1.0]), ([-1, -1], [0.0, 0.0]), ([], [])):
        slots = Slots.of(torch.tensor(indices, dtype=torch.int64), state)
        assert slots.blank(torch.ones(len(indices))).tolist() == expected
    assert Slots.of(None, state).blank(state) is state
