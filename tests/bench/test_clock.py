"""Timing in turns."""

from __future__ import annotations

import time

import torch

from selective_ssm.bench.clock import medians


def test_calls_take_turns_after_one_run_each_and_the_median_is_told() -> None:
    calls: list[str] = []
    naps = iter([0.5, 0.0, 0.03, 0.3])

    def slow() -> None:
        calls.append("slow")
        time.sleep(next(naps))

    taken = medians({"slow": slow, "fast": lambda: calls.append("fast")}, torch.device("cpu"), rounds=3)
    assert calls == ["slow", "fast"] * 4
    assert 0.03 <= taken["slow"] < 0.3
    assert taken["fast"] < 0.03
