"""Synthetic tasks: what is asked for is there, once, and where it stands is chance."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selective_ssm.config import from_tagged, to_tagged
from selective_ssm.errors import UserError
from selective_ssm.tasks.synthetic import (
    TASKS,
    Copying,
    InductionHeads,
    MultiQueryRecall,
    SelectiveCopying,
    SyntheticTask,
    generator_of,
)

SMALL: list[SyntheticTask] = [
    SelectiveCopying(length=40, vocab_size=7, items=5),
    Copying(length=40, vocab_size=7, items=5),
    InductionHeads(length=20, vocab_size=6),
    MultiQueryRecall(length=48, vocab_size=64, items=6),
]
every_task = pytest.mark.parametrize("task", SMALL, ids=lambda task: task.kind)


def test_every_kind_is_tried() -> None:
    assert {task.kind for task in SMALL} == set(TASKS)


@given(seed=st.integers(0, 255), items=st.integers(1, 8), vocabulary=st.integers(4, 9))
def test_items_are_asked_for_in_the_order_in_which_they_stand(seed: int, items: int, vocabulary: int) -> None:
    for kind in (SelectiveCopying, Copying):
        task = kind(length=11, vocab_size=vocabulary, items=items)
        ids, targets, cu_seqlens = task.draw(3, generator_of(seed, "cpu"))
        assert (targets[:, task.due] != -100).all()
        assert cu_seqlens is None
        assert ids.shape == targets.shape == (3, 11 + items)
        assert (ids[:, 11:] == vocabulary - 1).all()
        assert (targets[:, :11] == -100).all()
        for row, answers in zip(ids[:, :11].tolist(), targets[:, 11:].tolist(), strict=True):
            assert [token for token in row if token] == answers
            assert all(0 < token < vocabulary - 1 for token in answers)
            if kind is Copying:
                assert row[:items] == answers


def test_items_stand_anywhere() -> None:
    task = SelectiveCopying(length=8, vocab_size=4, items=2)
    ids, _, _ = task.draw(28_000, generator_of(0, "cpu"))
    places = Counter(tuple(row.nonzero().flatten().tolist()) for row in ids[:, :8])
    assert len(places) == 28
    assert all(abs(count - 1000) < 6 * 1000**0.5 for count in places.values()), "each pair of places is as likely"


@given(seed=st.integers(0, 255), length=st.integers(3, 12), vocabulary=st.integers(3, 8))
def test_a_token_that_comes_twice_was_followed_by_the_answer(seed: int, length: int, vocabulary: int) -> None:
    task = InductionHeads(length=length, vocab_size=vocabulary)
    ids, targets, _ = task.draw(4, generator_of(seed, "cpu"))
    assert targets[:, task.due].equal(targets[:, -1:])
    assert ids.shape == targets.shape == (4, length)
    assert (targets[:, :-1] == -100).all()
    for row, answer in zip(ids.tolist(), targets[:, -1].tolist(), strict=True):
        asked = [place for place, token in enumerate(row) if token == vocabulary - 1]
        assert len(asked) == 2
        assert asked[1] == length - 1
        assert row[asked[0] + 1] == answer < vocabulary - 1


def test_the_first_of_the_two_stands_anywhere() -> None:
    ids, _, _ = InductionHeads(length=6, vocab_size=4).draw(4000, generator_of(0, "cpu"))
    counts = Counter((ids == 3).int().argmax(1).tolist())
    assert set(counts) == {0, 1, 2, 3}
    assert all(abs(count - 1000) < 6 * 1000**0.5 for count in counts.values())


@given(seed=st.integers(0, 255), items=st.integers(1, 6))
def test_each_key_comes_again_once_and_its_value_is_due(seed: int, items: int) -> None:
    task = MultiQueryRecall(length=4 * items + 7, vocab_size=2 * items + 2, items=items)
    ids, targets, _ = task.draw(3, generator_of(seed, "cpu"))
    assert (targets[:, task.due] != -100).sum() == (targets != -100).sum() == 3 * items
    for row, due in zip(ids.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0 : 2 * items : 2], row[1 : 2 * items : 2], strict=True))
        assert len(pairs) == items
        assert all(0 < key <= items < value < 2 * items + 2 for key, value in pairs.items())
        asked = {row[place]: answer for place, answer in enumerate(due) if answer != -100}
        assert asked == pairs
        assert sum(answer != -100 for answer in due) == items
        assert all(answer == -100 for answer in due[: 2 * items])


def test_keys_come_again_soon_rather_than_late() -> None:
    task = MultiQueryRecall(length=256, vocab_size=64, items=4)
    _, targets, _ = task.draw(500, generator_of(0, "cpu"))
    asked = (targets != -100).nonzero()[:, 1]
    assert (asked < 72).sum() > (asked >= 72).sum(), "more in the first quarter of the places than in all others"


@every_task
def test_a_batch_is_a_function_of_seed_step_and_purpose(task: SyntheticTask) -> None:
    def drawn(**options: Any) -> list[int]:
        return task.draw(8, generator_of(**({"seed": 3, "device": "cpu"} | options))).ids.flatten().tolist()

    assert drawn() == drawn()
    others = [drawn(step=1), drawn(seed=4), drawn(is_test=True), drawn(step=1, is_test=True), drawn(seed=0, step=3)]
    assert all(one != drawn() for one in others)
    assert len({tuple(one) for one in others}) == len(others)


@every_task
def test_a_task_survives_json(task: SyntheticTask) -> None:
    assert from_tagged(json.loads(json.dumps(to_tagged(task))), TASKS) == task


@pytest.mark.parametrize(
    ("kind", "wrong", "sentence"),
    [
        (SelectiveCopying, {"length": 3, "items": 4}, "length must be 4 or more, got 3"),
        (SelectiveCopying, {"items": 0}, "items must be 1 or more"),
        (Copying, {"vocab_size": 3}, "copying: vocab_size must be 4 or more, got 3"),
        (InductionHeads, {"length": 2}, "length must be 3 or more"),
        (MultiQueryRecall, {"length": 63}, "length must be 64 or more"),
        (MultiQueryRecall, {"vocab_size": 33}, "vocab_size must be 34 or more"),
        (MultiQueryRecall, {"vocab_size": 35}, "must be even"),
        (MultiQueryRecall, {"power": 0.0}, "items and power must be above 0"),
    ],
)
def test_settings_that_leave_no_room_are_refused(kind: Any, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        kind(**wrong)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 256}, {"seed": 0, "step": 2**23}])
def test_seeds_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be from 0 to"):
        generator_of(**wrong, device="cpu")
