"""What is timed on a CPU: rows, ratios, peers that are missing."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from selective_ssm.bench.cases import OpCase, Setup, scan_inputs
from selective_ssm.bench.cpu import cases, floors, generation, models, operators, peers
from selective_ssm.bench.cpu.cases import DecodeCase, TaskCase
from selective_ssm.bench.cpu.memory import Allocated
from selective_ssm.bench.loop import scan_loop
from selective_ssm.bench.run import matrices
from selective_ssm.bench.subjects import ON_CPU
from selective_ssm.models import LanguageModel, LanguageModelConfig, presets
from selective_ssm.ops import native

SETUP = Setup(device=torch.device("cpu"), rounds=1)
SMALL = OpCase(batch=1, length=8, channels=16, states=3)
TINY = LanguageModelConfig(d_model=8, n_layer=2, vocab_size=16)
OURS = ["cpu", "reference"] if native.explain() is None else ["reference"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)


def without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "imported", lambda module: None)


def test_a_scan_is_compared_with_its_floor_and_its_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    without_peers(monkeypatch)
    setup = replace(SETUP, peers=("mambapy",))
    rows = list(operators.scan(SMALL, setup))
    floor, *ours = (row for row in rows if "note" not in row)
    assert set(floor) == {"case", "threads", "pass", "who", "ms"}
    assert [(row["who"], row["pass"]) for row in ours] == [
        (who, name) for who in OURS for name in ("forward", "backward")
    ]
    forward, backward = ours[:2]
    assert forward["of floor"] == pytest.approx(forward["ms"] / floor["ms"])
    assert backward["of forward"] == pytest.approx(backward["ms"] / forward["ms"])
    assert ("memory" in backward) == ("cpu" in OURS)
    assert rows[-1] == {"case": SMALL.name, "threads": 1, "who": "mambapy", "note": "not installed"}


def test_threads_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter((2, 2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: next(counts, 1))
    assert {row["threads"] for row in operators.scan(SMALL, SETUP)} == {1, 2}
    monkeypatch.undo()
    torch.set_num_threads(1)


@pytest.mark.parametrize(("run", "unit"), [(operators.conv, "ms"), (operators.step, "µs")])
def test_other_operators(run: Any, unit: str) -> None:
    rows = list(run(replace(SMALL, length=1) if unit == "µs" else SMALL, SETUP))
    assert list(dict.fromkeys(row["who"] for row in rows)) == ["floor", *OURS]
    assert all(row[unit] > 0 for row in rows)


@pytest.mark.parametrize("task", ["prefill", "decode", "training", "update"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_at_each_task(task: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    without_peers(monkeypatch)
    case = TaskCase(preset="tiny", task=task, batch=1, length=8, dtype=dtype, with_peers=task != "update")
    rows = list(models.model(case, replace(SETUP, peers=peers.PEERS)))
    assert [row["who"] for row in rows[:2]] == ["floor", "ours"]
    assert rows[1]["of floor"] == rows[1]["ms"] / rows[0]["ms"]
    assert [row["note"] for row in rows if "note" in row] == ["not installed"] * (3 if case.with_peers else 0)


def test_texts_side_by_side_are_compared_with_one() -> None:
    floor, *rows = generation.decode(DecodeCase(preset="tiny", batches=(1, 3)), SETUP)
    assert (floor["who"], set(floor)) == ("floor", {"case", "who", "ms"})
    assert [(row["who"], row["batch"]) for row in rows] == [("engine", 1), ("step", 1), ("engine", 3), ("step", 3)]
    alone, _, together, _ = rows
    assert alone["of batch 1"] == pytest.approx(1)
    assert together["tokens a second"] == pytest.approx(3 / (together["ms"] / 1e3))
    assert together["of batch 1"] == pytest.approx(together["tokens a second"] / alone["tokens a second"])
    assert together["of floor"] == pytest.approx(together["ms"] / floor["ms"])


def test_the_reference_is_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SELECTIVE_SSM_BACKEND", raising=False)
    seen: list[str | None] = []
    models._with_reference(lambda: seen.append(os.environ.get("SELECTIVE_SSM_BACKEND")))
    assert (seen, os.environ.get("SELECTIVE_SSM_BACKEND")) == (["reference"], None)


@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_of_a_model_is_in_its_floor(tied: bool) -> None:
    model = LanguageModel(replace(TINY, tie_embeddings=tied))
    weights = matrices(model)
    assert len(weights) == 4 * TINY.n_layer + 1
    assert len(weights[-1]) == TINY.padded_vocab_size
    floors.products(weights, 3)()
    floors.products_with_gradients(weights, 3)()


def test_peers_compute_what_we_do() -> None:
    inputs = scan_inputs(SMALL, SETUP.device)

    def pscan(decay: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        states = [torch.zeros_like(inputs[:, 0])]
        for token in range(inputs.shape[1]):
            states.append(decay[:, token] * states[-1] + inputs[:, token])
        return torch.stack(states[1:], 1)

    torch.testing.assert_close(peers._parallel_scan(pscan, **inputs), scan_loop(**inputs))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["prefill", "decode", "training"])
def test_hugging_face_is_called_as_it_wants(task: Any) -> None:
    pytest.importorskip("transformers", reason="needs the extra dev")
    case = TaskCase(preset="tiny", task=task, batch=1, length=8)
    loop, compiled = peers.transformers_models(case, TINY, ("transformers",))
    assert (loop.who, compiled.who) == ("transformers", "transformers, compiled")
    assert loop.call is not None
    loop.call()


def test_allocations_are_counted_and_own_ones_left_out() -> None:
    with Allocated() as allocated:
        kept = torch.zeros(10)
        kept.add(1)
    assert (allocated.beyond([kept]), allocated.beyond([])) == (40, 80)


def test_every_subject_has_cases_with_names_of_their_own() -> None:
    assert all(found for found, _ in ON_CPU.values())
    for found in (cases.SCAN, cases.CONV, cases.STEP, cases.MODEL):
        assert len({case.name for case in found}) == len(found)
