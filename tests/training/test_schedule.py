"""The learning rate over a run."""

from __future__ import annotations

import pytest

from selective_ssm.errors import UserError
from selective_ssm.training.schedule import ScheduleConfig, learning_rate_factor


def factors(config: ScheduleConfig, steps: int = 100) -> list[float]:
    return [learning_rate_factor(config, step=step, progress=step / steps) for step in range(steps + 1)]


def test_warm_up_rises_linearly_from_the_first_step() -> None:
    rising = factors(ScheduleConfig(shape="constant", warmup_steps=4))
    assert rising[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(ScheduleConfig(shape="constant", warmup_steps=0)) == [1.0] * 101


def test_cosine_falls_from_the_peak_to_the_minimum() -> None:
    falling = factors(ScheduleConfig(shape="cosine", warmup_steps=0, min_lr_ratio=0.1))
    assert falling[0] == 1.0
    assert falling[50] == pytest.approx(0.55)
    assert falling[-1] == pytest.approx(0.1)
    assert falling == sorted(falling, reverse=True)


def test_wsd_stays_and_then_falls_linearly() -> None:
    wsd = factors(ScheduleConfig(shape="wsd", warmup_steps=0, min_lr_ratio=0.0, decay_fraction=0.2))
    assert wsd[:81] == pytest.approx([1.0] * 81)
    assert wsd[90] == pytest.approx(0.5)
    assert wsd[-1] == 0.0


@pytest.mark.parametrize(
    "wrong", [{"warmup_steps": -1}, {"min_lr_ratio": 1.5}, {"decay_fraction": 0.0}, {"shape": "cosin"}]
)
def test_impossible_schedules_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        ScheduleConfig(**wrong)
