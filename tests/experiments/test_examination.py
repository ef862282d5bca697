"""What a model says does not depend on how its rows are read."""

from __future__ import annotations

import pytest
import torch

from selective_ssm.experiments import examination
from selective_ssm.experiments.examination import examined
from selective_ssm.models import LanguageModel, LanguageModelConfig
from selective_ssm.tasks import InductionHeads, MultiQueryRecall, SelectiveCopying, Share, SyntheticTask

TASKS: list[SyntheticTask] = [
    SelectiveCopying(length=24, vocab_size=8, items=4),
    InductionHeads(length=24, vocab_size=8),
    MultiQueryRecall(length=24, vocab_size=8, items=3),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_chunks_and_groups_change_nothing(task: SyntheticTask, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(d_model=16, n_layer=2, vocab_size=8, tie_embeddings=False)).double()
    whole = examined(model, task, 70)
    assert whole.sequences.all == 70
    assert 0 < whole.tokens.right < whole.tokens.all
    monkeypatch.setattr(examination, "_CHUNK", 10)
    monkeypatch.setattr(examination, "_TOKENS", 240)
    assert examined(model, task, 70) == whole
    assert examined(model, task, 70, first=5) != whole, "other rows"


def test_nothing_asked() -> None:
    model = LanguageModel(LanguageModelConfig(d_model=4, n_layer=1, vocab_size=8))
    assert examined(model, TASKS[1], 0).tokens == Share(right=0, all=0)
