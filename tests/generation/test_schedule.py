"""Dealing out a step's budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from selective_ssm.generation.schedule import is_time_to_read, shares


@given(st.lists(st.integers(1, 50)), st.integers(1, 100))
def test_the_budget_is_used_up_in_the_order_of_arrival(left: list[int], budget: int) -> None:
    dealt = shares(left, budget)
    assert sum(dealt) == min(budget, sum(left))
    partly = [row for row, (given, wanted) in enumerate(zip(dealt, left, strict=True)) if given < wanted]
    assert not any(dealt[row] for row in partly[1:]), "who comes later waits for who came first"


def test_nobody_reads_where_nobody_waits() -> None:
    assert shares([], 5) == []


def test_prompts_are_read_at_once_where_little_is_written() -> None:
    assert is_time_to_read([1], 100, writing=0, waited=0)
    assert is_time_to_read([1, 1], 100, writing=2, waited=0)
    assert not is_time_to_read([1], 100, writing=2, waited=0)


def test_prompts_that_fill_the_budget_do_not_wait() -> None:
    assert is_time_to_read([60, 40], 100, writing=50, waited=0)
    assert not is_time_to_read([60, 39], 100, writing=50, waited=0)


def test_nobody_waits_for_ever() -> None:
    waited = next(steps for steps in range(100) if is_time_to_read([0], 100, writing=50, waited=steps))
    assert 0 < waited < 20
    assert not is_time_to_read([], 100, writing=0, waited=99), "there is nobody"
