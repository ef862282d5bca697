"""Which runs a cell needs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from selective_ssm.config import from_tagged, to_tagged
from selective_ssm.errors import UserError
from selective_ssm.experiments.cell import KINDS, Run, judged_by, wanted
from tests.experiments.conftest import TINY

RATES = (1e-3, 1e-4, 1e-2)
CELL = replace(TINY, learning_rates=RATES, seeds=3)


def test_every_rate_has_one_seed_and_the_best_has_all() -> None:
    scores: dict[Run, float] = {}
    order = []
    while runs := wanted(CELL, scores):
        order.append(runs[0])
        scores[runs[0]] = {1e-3: 0.6, 1e-4: 0.9, 1e-2: 0.2}[runs[0].learning_rate]
    assert order == [Run(1e-3, 0), Run(1e-4, 0), Run(1e-2, 0), Run(1e-4, 1), Run(1e-4, 2)]
    assert judged_by(CELL, scores) == [Run(1e-4, seed) for seed in range(3)]


def test_a_later_seed_does_not_change_which_rate_is_best() -> None:
    scores = {Run(1e-3, 0): 0.6, Run(1e-4, 0): 0.9, Run(1e-2, 0): 0.2, Run(1e-4, 1): 0.0}
    assert wanted(CELL, scores) == [Run(1e-4, 2)]


@pytest.mark.parametrize(
    ("shares", "best"), [((1, 1, 1), 1e-3), ((1, 1, 0), 1e-3), ((0, 1, 1), 1e-2), ((0, 0, 0), 1e-3)]
)
def test_of_rates_that_do_as_well_it_is_the_one_in_the_middle(shares: tuple[int, ...], best: float) -> None:
    scores = {Run(rate, 0): share for rate, share in zip((1e-4, 1e-3, 1e-2), shares, strict=True)}
    assert judged_by(CELL, scores)[0].learning_rate == best


def test_a_cell_survives_json() -> None:
    assert from_tagged(json.loads(json.dumps(to_tagged(CELL))), KINDS) == CELL


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"precision": "fp16"}, "precision must be one of 'fp32', 'bf16'"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"learning_rates": ()}, "learning_rates must hold at least one"),
        ({"model": replace(TINY.model, vocab_size=3)}, "model.vocab_size must be 4 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        replace(CELL, **wrong)
