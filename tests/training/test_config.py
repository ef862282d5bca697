"""A whole run as one config."""

from __future__ import annotations

import pickle

import pytest

from selective_ssm.config import from_tagged, to_tagged
from selective_ssm.errors import UserError
from selective_ssm.training.config import KINDS, TrainerConfig
from tests.training.conftest import MakeConfig


def test_a_run_survives_its_tagged_form_and_pickling(make_config: MakeConfig) -> None:
    config = make_config(ema_decay=0.9, precision="bf16")
    assert from_tagged(to_tagged(config), KINDS) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_nearer_of_two_limits_ends_a_run() -> None:
    both = TrainerConfig(output="run", max_steps=100, max_minutes=2)
    assert both.progress(step=50, seconds=6) == 0.5
    assert both.progress(step=5, seconds=90) == 0.75
    assert TrainerConfig(output="run", max_steps=10).progress(step=11, seconds=1e9) == 1.0
    assert TrainerConfig(output="run", max_minutes=1).progress(step=10**9, seconds=30) == 0.5


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({}, "max_steps, max_minutes"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps": 1, "accumulate": 0}, "accumulate"),
        ({"max_minutes": float("nan")}, "max_minutes"),
        ({"max_steps": 1, "seed": -1}, "seed"),
        ({"max_steps": 1, "seed": 2**32}, "seed"),
        ({"max_steps": 1, "workers": -1}, "workers"),
        ({"max_steps": 1, "ema_decay": 1.0}, "ema_decay"),
        ({"max_steps": 1, "precision": "bf61"}, "did you mean 'bf16'"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        TrainerConfig(output="run", **wrong)
