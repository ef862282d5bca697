"""Evaluation: whole documents, whatever their length, however they are read."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from selective_ssm.data import ByteTokenizer, Document
from selective_ssm.errors import UserError
from selective_ssm.evaluation import Evaluation, evaluate, perplexity
from selective_ssm.models import LanguageModel, LanguageModelConfig

BYTES = ByteTokenizer()
TEXTS = (b"a", "é".encode(), bytes(range(0, 256, 3)), b"abc" * 20, b"x" * 17)


@pytest.fixture
def model() -> LanguageModel:
    """In float64, and untrained but for an embedding that makes some tokens far likelier than others."""
    made = LanguageModel(LanguageModelConfig(d_model=16, n_layer=2, vocab_size=257)).double()
    with torch.no_grad():
        made.embedding.weight.mul_(10)
    return made


def documents() -> Iterator[Document]:
    return (Document(str(number), text) for number, text in enumerate(TEXTS))


def test_every_byte_and_every_end_is_predicted_from_all_before_it(model: LanguageModel) -> None:
    """Against one forward over each whole document."""
    nats = 0.0
    for text in TEXTS:
        ids = torch.tensor([[256, *text, 256]])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0]
        nats += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    found = evaluate(model, documents(), BYTES)
    assert found.nats == pytest.approx(nats, rel=1e-12)
    assert found.bytes == sum(map(len, TEXTS))
    assert found.tokens == found.bytes + len(TEXTS)


@pytest.mark.parametrize(("group", "chunk"), [(1, 1000), (1, 7), (2, 50), (3, 1), (5, 64), (16, 10_000)])
def test_how_documents_are_read_does_not_matter(model: LanguageModel, group: int, chunk: int) -> None:
    expected = evaluate(model, documents(), BYTES).nats
    assert evaluate(model, documents(), BYTES, group=group, chunk=chunk).nats == pytest.approx(expected, rel=1e-9)


def test_the_model_never_reads_more_than_a_chunk_at_once(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    evaluate(model, documents(), BYTES, group=4, chunk=32)
    assert max(lengths) <= 32
    assert sum(lengths) == sum(map(len, TEXTS)) + len(TEXTS)


def test_documents_are_taken_a_group_at_a_time(model: LanguageModel) -> None:
    taken: list[str] = []
    read_before: list[int] = []
    model.register_forward_pre_hook(lambda *_: read_before.append(len(taken)))

    def watched() -> Iterator[Document]:
        for document in documents():
            taken.append(document.name)
            yield document

    evaluate(model, watched(), BYTES, group=2)
    assert sorted(set(read_before)) == [2, 4, 5]


def test_a_document_takes_five_times_its_size(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text, and 4 bytes an id; 0.2 MB are allowed for everything else."""
    size = 1_000_000
    monkeypatch.setattr(perplexity, "_packed_loss", lambda *_: (0.0, None))
    tracemalloc.start()
    evaluate(model, (Document(str(number), b"%d" % number * size) for number in range(3)), BYTES, group=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * size + 200_000


def test_an_even_model_needs_the_logarithm_of_its_vocabulary(model: LanguageModel) -> None:
    torch.nn.init.zeros_(model.embedding.weight)
    found = evaluate(model, [Document("one", b"0123456789")], BYTES)
    assert found.loss == pytest.approx(math.log(257))
    assert found.perplexity == pytest.approx(257)
    assert found.bits_per_byte == pytest.approx(math.log2(257) * 11 / 10)


def test_a_hopeless_model_has_an_infinite_perplexity() -> None:
    assert Evaluation(nats=1e6, tokens=1, bytes=1).perplexity == math.inf


def test_nothing_to_evaluate_is_said(model: LanguageModel) -> None:
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(model, [], BYTES)
