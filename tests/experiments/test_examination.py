"""What a model says does not depend on how its rows are read."""

from __future__ import annotations

import pytest
import torch

from selective_ssm.experiments import examination
from selective_ssm.experiments.examination import drawn_together, examined
from selective_ssm.layers import AttentionConfig, MambaConfig, MixerConfig
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


@pytest.mark.parametrize(("mixer", "rows"), [(MambaConfig(), 24), (AttentionConfig(n_heads=2), 10)])
def test_states_that_grow_are_kept_of_fewer_rows(
    mixer: MixerConfig, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "_CHUNK", 10)
    monkeypatch.setattr(examination, "_TOKENS", 240)
    model = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=8, pattern=(mixer,)))
    seen: set[tuple[int, ...]] = set()
    model.register_forward_pre_hook(lambda _, inputs: seen.add(tuple(inputs[0].shape)))
    examined(model, InductionHeads(length=24, vocab_size=8), 40)
    assert max(seen) == (rows, 10)


@pytest.mark.parametrize(
    ("length", "rows", "rows_on_gpu"),
    [(2**6, 64, 64), (2**16, 64, 64), (2**17, 32, 64), (2**20, 4, 64), (2**24, 1, 16)],
)
def test_long_rows_are_drawn_a_few_at_a_time(length: int, rows: int, rows_on_gpu: int) -> None:
    assert drawn_together(length, torch.device("cpu")) == rows
    assert drawn_together(length, torch.device("cuda")) == rows_on_gpu


def test_nothing_asked() -> None:
    model = LanguageModel(LanguageModelConfig(d_model=4, n_layer=1, vocab_size=8))
    assert examined(model, TASKS[1], 0).tokens == Share(right=0, all=0)
