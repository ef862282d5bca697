"""transformers is timed on both its paths, on the same model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selective_ssm.bench import fast_ops
from selective_ssm.bench.cases import Setup
from selective_ssm.bench.cpu.cases import TaskCase
from selective_ssm.models import LanguageModelConfig, presets

SETUP = Setup(device=torch.device("cpu"), rounds=1)


@pytest.mark.parametrize("task", ["prefill", "decode", "training"])
def test_both_paths_are_timed(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "tiny", LanguageModelConfig(d_model=8, n_layer=2, vocab_size=16))
    case = TaskCase(preset="tiny", task=task, batch=2, length=8)
    own, ours = fast_ops.fast_ops(case, SETUP)
    assert (own["who"], ours["who"]) == ("transformers", "transformers, our ops")
    assert own["times as fast"] == 1
    assert ours["times as fast"] == pytest.approx(own["ms"] / ours["ms"])
    assert ours["tokens a second"] == pytest.approx((2 if task == "decode" else 16) / ours["ms"] * 1e3)


def test_transformers_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_ops, "imported", lambda module: None)
    assert [row["note"] for row in fast_ops.fast_ops(fast_ops.ON_CPU[0], SETUP)] == ["not installed"]
