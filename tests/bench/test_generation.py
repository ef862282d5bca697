"""Writing, as it is timed anywhere: rows, those who cannot go on, a plot."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.bench import huggingface, writers, writing
from selective_ssm.bench.cases import Setup, WritingCase
from selective_ssm.bench.contenders import Contender
from selective_ssm.bench.gpu import decoding, generation, peers, serving
from selective_ssm.bench.gpu.cases import DecodeCase, ForkCase, LoadCase, PrefillCase, SoakCase
from selective_ssm.bench.run import Row, fresh, matrices
from selective_ssm.models import LanguageModelConfig, preset, presets

SETUP = Setup(device=torch.device("cpu"), rounds=1)
TINY = LanguageModelConfig(d_model=16, n_layer=2, vocab_size=32)
WRITING = WritingCase(preset="tiny", over="length", shapes=((2, 12),), new_tokens=4)
LOAD: dict[str, Any] = {"preset": "tiny", "texts": 6, "prompt": (1, 9), "new_tokens": (1, 5), "slots": (2,)}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)
    monkeypatch.setattr(decoding, "_TIMES", 3)


class Stub:
    """One who writes nothing, and fails at four texts."""

    parameters = 5

    def __init__(self, most_tokens: int | None = None) -> None:
        self.most_tokens = most_tokens
        self.wrote: list[tuple[int, int]] = []

    def take(self, prompts: Tensor, new_tokens: int) -> None:
        self._texts = len(prompts)
        if self._texts == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot.\nMore words")

    def write(self, new_tokens: int) -> None:
        self.wrote.append((self._texts, new_tokens))


def shapes(writer: Stub, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[Row]:
    monkeypatch.setattr(writers, "contenders", lambda *_: [Contender("stub", lambda: writer, [])])
    sizes = ((1, 2), (2, 2), (4, 2), (8, 2))
    case = WritingCase(preset="tiny", over="batch", shapes=sizes, new_tokens=3, **settings)
    return list(generation.generate(case, SETUP))


def test_a_step_is_told_with_its_parts() -> None:
    rows = {row["what"]: row for row in decoding.decode(DecodeCase(preset="tiny", batch=2), SETUP)}
    assert list(rows) == [
        *decoding.SAMPLING,
        "matrix products",
        "matrix products of torch",
        "states",
        "the rest",
        "floor",
    ]
    greedy = rows["greedy"]
    assert greedy["of floor"] == pytest.approx(greedy["ms"] / rows["floor"]["ms"])
    parts = sum(rows[what]["ms"] for what in ("matrix products", "states", "the rest"))
    assert parts == pytest.approx(greedy["ms"])
    assert greedy["a state"] == "bfloat16 0.00 MB, float32 0.00 MB"


def test_the_products_are_those_of_the_model() -> None:
    weights = matrices(fresh(preset("tiny"), SETUP.device, torch.bfloat16))
    shapes: list[tuple[int, ...]] = []

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        shapes.append((*x.shape, len(weight)))
        return F.linear(x, weight)

    decoding.products(weights, 3, apply)()
    assert shapes == [(3, weight.shape[1], len(weight)) for weight in weights]


def test_a_fork_is_set_beside_a_copy() -> None:
    rows = list(decoding.decode(ForkCase(preset="tiny", copies=(1, 4)), SETUP))
    assert [row["what"] for row in rows] == ["clone", "select 1", "select 4"]
    assert rows[2]["floor ms"] == pytest.approx(2.5 * rows[1]["floor ms"])
    assert all(row["ms"] > 0 and row["gpu ms"] > 0 for row in rows)


def test_reading_is_timed_with_logits_and_without() -> None:
    rows = list(generation.generate(PrefillCase(preset="tiny", batch=2, length=8), SETUP))
    assert [row["what"] for row in rows] == ["read", "prefill"]
    assert all(row["tokens a second"] == pytest.approx(16 / (row["wall µs"] / 1e6)) for row in rows)


def test_whoever_cannot_go_on_is_asked_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Stub()
    rows = shapes(writer, monkeypatch)
    assert writer.wrote == [(1, 1), (1, 1), (1, 3), (2, 1), (2, 1), (2, 3)], "once to be warm, then to be timed"
    assert [row["batch"] for row in rows] == [1, 2, 4, 8]
    assert [row.get("note") for row in rows] == [None, None, "CUDA out of memory", "CUDA out of memory"]
    assert {"case", "who", "length", "tokens a second", "first token ms", "parameters"} < set(rows[0])


def test_what_follows_a_long_reading_has_no_figure_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {1: (1.0, 5.0), 2: (1.0, 5.0), 4: (4.0, 5.0), 8: (4.0, 5.0)}
    monkeypatch.setattr(writing, "_attempt", lambda writer, prompts, case, setup: times[len(prompts)])
    assert [row.get("decoding") for row in shapes(Stub(), monkeypatch)] == [0.5, 1.0, None, None]


def test_the_slow_are_asked_for_little(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = shapes(Stub(most_tokens=2), monkeypatch)
    assert [row.get("note") for row in rows] == [None, *["left out: reads token by token"] * 3]
    assert [row.get("note") for row in shapes(Stub(), monkeypatch, patience=0.0)] == [
        None,
        *["left out: a smaller one took 0 s"] * 3,
    ]


def test_ours_reads_the_prompts_and_writes_after_each() -> None:
    (ours,) = writers.contenders(WRITING, TINY, SETUP)
    assert ours.call is not None
    writer = ours.call()
    writer.take(torch.randint(32, (3, 5)), 4)
    before = writer._engine.stats().tokens
    writer.write(4)
    assert writer._engine.stats().tokens == before + 12


def watch(generate: Any, sizes: list[Any], *args: Any, **kwargs: Any) -> None:
    sizes.append(tuple(generate(*args, **kwargs).shape))


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_writes_as_many_tokens_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs the extra dev")
    peers_too = Setup(device=SETUP.device, peers=("transformers",))
    _, *theirs = writers.contenders(WRITING, TINY, peers_too)
    assert [one.who for one in theirs] == [writers.TRANSFORMER, writers.LOOP]
    for one in theirs:
        assert one.call is not None
        writer = one.call()
        sizes: list[Any] = []
        watched = partial(watch, writer._model.generate, sizes)
        monkeypatch.setattr(writer._model, "generate", watched)
        writer.take(torch.randint(32, (2, 10)), 4)
        writer.write(4)
        assert sizes == [(2, 8 + 2), (2, 10 + 4)]


def test_a_transformer_is_of_the_size_of_a_mamba() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra dev")
    for name, heads in (("mamba-130m", 12), ("mamba-370m", 16), ("mamba-1.4b", 16)):
        with torch.device("meta"):
            theirs = huggingface.transformer(transformers, preset(name), 2048)
        ours = sum(fresh(preset(name), torch.device("meta"), torch.bfloat16).num_parameters().values())
        body = sum(one.numel() for one in theirs.parameters()) - theirs.get_output_embeddings().weight.numel()
        assert theirs.config.num_attention_heads == heads
        assert body == pytest.approx(ours, rel=0.1)


def test_peers_that_are_missing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "imported", lambda module: None)
    setup = Setup(device=SETUP.device, rounds=1, peers=peers.PEERS)
    case = WritingCase(preset="tiny", over="length", shapes=((1, 2),), new_tokens=2)
    rows = [*generation.generate(case, setup), *decoding.decode(DecodeCase(preset="tiny", batch=1), setup)]
    assert [row["who"] for row in rows if row.get("note") == "not installed"] == [
        "mamba_ssm",
        writers.TRANSFORMER,
        writers.LOOP,
        "mamba_ssm",
    ]


def test_an_engine_under_load_is_compared_with_one_batch() -> None:
    case = LoadCase(**LOAD, budgets=(4, 100))
    static, in_pairs, small, large = generation.generate(case, SETUP)
    named = ["static batches of 2", "engine, 2 slots, reads 4", "engine, 2 slots, reads 100"]
    assert [row["what"] for row in (in_pairs, small, large)] == named
    assert small["of static"] == pytest.approx(small["tokens a second"] / static["tokens a second"])
    texts = serving.texts(case, 32)
    assert texts == serving.texts(case, 32)
    assert all(1 <= len(ids) <= 9 and 1 <= count <= 5 and max(ids) < 32 for ids, count in texts)


def test_memory_is_looked_at_twice() -> None:
    first, last = generation.generate(SoakCase(**LOAD, seconds=0.0, first=20), SETUP)
    assert first["what"] == last["what"]
    assert str(first["what"]).startswith("20 steps, ")


def test_speed_and_memory_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    common = {"who": "ours", "tokens a second": 5.0, "GiB": 2.0}
    rows: list[Row] = [
        *({"case": "tiny-batch", "batch": batch, "length": 8} | common for batch in (1, 2)),
        *({"case": "tiny-length", "batch": 1, "length": length} | common | {"who": "theirs"} for length in (8, 16)),
        {"case": "tiny-batch", "who": "absent", "note": "not installed"},
    ]
    writing.draw(rows, tmp_path / "generate.svg")
    drawn = (tmp_path / "generate.svg").read_text()
    assert ">tiny: ours<" in drawn
    assert ">tiny: theirs<" in drawn
    assert "absent" not in drawn
