"""Dealing out a step's budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from selective_ssm.generation.schedule import shares


@given(st.lists(st.integers(1, 50)), st.integers(1, 100))
def test_the_budget_is_used_up_in_the_order_of_arrival(left: list[int], budget: int) -> None:
    dealt = shares(left, budget)
    assert sum(dealt) == min(budget, sum(left))
    partly = [row for row, (given, wanted) in enumerate(zip(dealt, left, strict=True)) if given < wanted]
    assert not any(dealt[row] for row in partly[1:]), "who comes later waits for who came first"


def test_nobody_reads_where_nobody_waits() -> None:
    assert shares([], 5) == []
