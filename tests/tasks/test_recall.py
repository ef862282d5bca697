"""Counting right answers."""

from __future__ import annotations

import math

import pytest
import torch

from selective_ssm.tasks.recall import Share, recall


def test_a_sequence_is_right_when_all_its_answers_are() -> None:
    said = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    targets = torch.tensor([[1, -100, 3], [1, 2, 4], [-100, -100, -100], [-100, 2, -100]])
    found = recall(torch.nn.functional.one_hot(said, 5).float(), targets)
    assert found.tokens == Share(right=5, all=6)
    assert found.sequences == Share(right=2, all=3)
    assert (found + found).sequences == Share(right=4, all=6)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_intervals_hold_the_share_nineteen_times_of_twenty(share: float) -> None:
    covered = 0.0
    for right in range(401):
        low, high = Share(right=right, all=400).interval
        covered += (low <= share <= high) * math.comb(400, right) * share**right * (1 - share) ** (400 - right)
    assert covered == pytest.approx(0.95, abs=0.02)


def test_the_ends_of_the_scale() -> None:
    low, high = Share(right=1024, all=1024).interval
    assert low == pytest.approx(1024 / (1024 + 1.96**2), abs=1e-5)
    assert high == 1
    assert Share(right=0, all=10).interval[0] == 0
    assert math.isnan(Share(right=0, all=0).value)
    assert Share(right=0, all=0).interval == (0, 1)


def test_what_is_no_number_is_not_right() -> None:
    logits = torch.tensor([[[1.0, 0.0], [torch.nan, torch.nan]]])
    found = recall(logits, torch.tensor([[0, 0]]))
    assert (found.tokens, found.sequences) == (Share(right=1, all=2), Share(right=0, all=1))
