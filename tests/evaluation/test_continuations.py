"""Continuations after contexts: the right figures, and no token read twice."""

from __future__ import annotations

import random

import pytest
import torch

from selective_ssm.errors import UserError
from selective_ssm.evaluation import score_continuations
from selective_ssm.models import LanguageModel, LanguageModelConfig

Pair = tuple[list[int], list[int]]


@pytest.fixture
def model() -> LanguageModel:
    """In float64, and untrained but for an embedding that makes some tokens far likelier than others."""
    made = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=20)).double()
    with torch.no_grad():
        made.embedding.weight.mul_(20)
    return made


@pytest.fixture
def pairs() -> list[Pair]:
    """Texts of three tokens, so that many begin alike, and some are the beginning of others or the same."""

    def drawn(most: int) -> list[int]:
        return [random.randrange(3) for _ in range(random.randint(1, most))]

    return [(drawn(12), drawn(6)) for _ in range(30)]


def beginnings(pairs: list[Pair]) -> set[tuple[int, ...]]:
    """All that has to be read: every beginning of every text, but for the texts' last tokens."""
    texts = [(*context, *continuation) for context, continuation in pairs]
    return {text[:length] for text in texts for length in range(1, len(text))}


def test_each_score_is_that_of_the_text_by_itself(model: LanguageModel, pairs: list[Pair]) -> None:
    found = score_continuations(model, pairs)
    for (context, continuation), logprob, greedy in zip(pairs, found.logprobs, found.greedy, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum().item()
        assert logprob == pytest.approx(expected, rel=1e-12)
        assert greedy == (logits.argmax(-1).tolist() == continuation)
    assert 0 < sum(found.greedy) < len(pairs)


@pytest.mark.parametrize(("chunk", "batch"), [(1, 1), (5, 3), (30, 1000)])
def test_how_texts_are_read_does_not_matter_and_none_is_read_twice(
    model: LanguageModel, pairs: list[Pair], chunk: int, batch: int
) -> None:
    expected = score_continuations(model, pairs)
    lengths: list[int] = []
    states: list[int] = []

    def watch(_: object, arguments: tuple[torch.Tensor, ...], options: dict[str, torch.Tensor]) -> None:
        lengths.append(arguments[0].shape[1])
        states.append(options["cu_seqlens"].shape[0] - 1)

    model.register_forward_pre_hook(watch, with_kwargs=True)
    found = score_continuations(model, pairs, chunk=chunk, batch=batch)
    assert found.logprobs == pytest.approx(expected.logprobs, rel=1e-12)
    assert found.greedy == expected.greedy
    assert max(lengths) <= chunk
    assert max(states) <= batch
    assert found.tokens == expected.tokens == sum(lengths) == len(beginnings(pairs))


def test_a_context_is_read_once_for_all_its_answers(model: LanguageModel) -> None:
    context = [1] * 50
    found = score_continuations(model, [(context, [answer, 2, 3]) for answer in range(4, 8)])
    assert found.tokens == 50 + 4 * 2


def test_one_is_told_how_far_it_is(model: LanguageModel, pairs: list[Pair]) -> None:
    done: list[int] = []
    score_continuations(model, pairs, batch=8, on_done=done.append)
    assert len(done) > 5
    assert sum(done) == len(pairs)


def test_nothing_is_scored_without_reading() -> None:
    found = score_continuations(LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=8)), [])
    assert (found.logprobs, found.greedy, found.tokens) == ([], [], 0)


@pytest.mark.parametrize("pair", [([], [1]), ([1], [])])
def test_a_pair_with_nothing_on_one_side_is_refused(model: LanguageModel, pair: Pair) -> None:
    with pytest.raises(UserError, match="at least one token each"):
        score_continuations(model, [([1], [2]), pair])


@pytest.mark.parametrize("options", [{"chunk": 0}, {"batch": 0}])
def test_nothing_can_be_read_no_tokens_at_a_time(model: LanguageModel, options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="chunk and batch must be 1 or more"):
        score_continuations(model, [([1], [2])], **options)
