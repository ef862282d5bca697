"""Engines are timed at what is said of them."""

from __future__ import annotations

import pytest

from selective_ssm.bench import engines
from selective_ssm.models import LanguageModel, LanguageModelConfig


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16))


def test_a_step_of_a_busy_engine_writes_a_token_of_every_text(model: LanguageModel) -> None:
    engine = engines.busy(model, 3, engines.GREEDY)
    before = engine.stats()
    assert (before.running, before.free_slots, before.queued) == (3, 0, 0)
    engine.step()
    assert engine.stats().tokens == before.tokens + 3


def test_a_ready_engine_is_idle_and_serves_texts_to_their_end(model: LanguageModel) -> None:
    engine = engines.ready(model, slots=2, prefill_budget=4)
    before = engine.stats()
    assert before.free_slots == 2
    engines.serve(engine, [([1, 2, 3], 5), ([4], 7), ([5, 6], 1)])
    after = engine.stats()
    assert (after.tokens - before.tokens, after.free_slots, after.queued) == (13, 2, 0)
