"""Engines that are ready to be timed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from selective_ssm.generation import Engine
from selective_ssm.generation.sampling import SamplingOptions
from selective_ssm.models import LanguageModel

GREEDY: SamplingOptions = {"temperature": 0.0}
_ENDLESS = 2**40  # tokens
_FIRST_STEPS = 4  # in which kernels are compiled, and steps captured or recorded

Text = tuple[Sequence[int], int]
"""A prompt, and how many tokens to write after it."""


def ready(model: LanguageModel, *, slots: int, prefill_budget: int) -> Engine:
    """An idle engine that has kernels and graphs at hand for greedy texts, however many at once."""
    engine = Engine(model, slots=slots, prefill_budget=prefill_budget)
    serve(engine, [([0] * 2, 2)])
    engine.warm_up(**GREEDY)
    return engine


def busy(model: LanguageModel, batch: int, sampling: SamplingOptions) -> Engine:
    """An engine whose next steps write a token each of as many texts, and do nothing else."""
    engine = Engine(model, slots=batch)
    for _ in range(batch):
        engine.submit([0], max_new_tokens=_ENDLESS, **sampling)
    for _ in range(_FIRST_STEPS):
        engine.step()
    return engine


def serve(engine: Engine, texts: Iterable[Text]) -> None:
    """Ask for texts, all at once, and wait for them."""
    for prompt, new_tokens in texts:
        engine.submit(prompt, max_new_tokens=new_tokens, **GREEDY)
    engine.run()
