"""What is timed on a GPU runs anywhere, by the wall's clock: rows, peers that are missing, a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from selective_ssm.bench.cases import ModelCase, OpCase, Setup, scan_inputs
from selective_ssm.bench.contenders import Contender, kept_bytes
from selective_ssm.bench.gpu import host, lengths, models, operators
from selective_ssm.bench.gpu.attention import TransformerLayer
from selective_ssm.bench.gpu.cases import CallCase, LengthCase
from selective_ssm.bench.gpu.clock import host_seconds, time_of
from selective_ssm.bench.gpu.models import TwoBlocks
from selective_ssm.bench.subjects import ON_GPU
from selective_ssm.models import presets
from selective_ssm.models.config import LanguageModelConfig
from selective_ssm.ops import native, selective_scan

SETUP = Setup(device=torch.device("cpu"), rounds=1, peers=("mamba_ssm", "sdpa"))
SMALL = OpCase(batch=1, length=8, channels=16, states=3, dtype=torch.bfloat16)
TOKEN = OpCase(batch=2, length=1, channels=16, states=3, dtype=torch.bfloat16)
LENGTH = LengthCase(length=16, batch=2, d_model=32, head_dim=8)
TIMES, FLOOR = {"gpu µs", "wall µs"}, {"memory floor µs"}


@pytest.fixture(autouse=True)
def without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch stands in for the CUDA kernels: it keeps states of short sequences too."""
    monkeypatch.setattr(native, "explain", lambda: "it is not what is timed here")


def rows(run: Any, case: Any) -> list[dict[str, Any]]:
    found = list(run(case, SETUP))
    assert all(value > 0 for row in found for name, value in row.items() if isinstance(value, float))
    return found


def test_operators() -> None:
    common = {"case", "pass", "who"}
    forward, both, *theirs = rows(operators.scan, SMALL)
    assert set(forward) == common | TIMES | FLOOR
    assert set(both) == common | TIMES | FLOOR | {"kept MB", "kept of one tensor"}
    assert {row["note"] for row in theirs} == {"not installed"}
    assert {row["note"] for row in operators.scan(OpCase(**vars(SMALL) | {"reverse": True}), SETUP) if "note" in row}
    for run in (operators.conv, operators.norm):
        ours = [row for row in rows(run, SMALL) if "note" not in row]
        assert [(row["pass"], set(row)) for row in ours] == [
            (name, common | TIMES | {"share of copy"}) for name in ("forward", "backward")
        ]
    assert set(rows(operators.step, TOKEN)[0]) == {"case", "who", "host µs"} | TIMES


def test_what_a_backward_pass_keeps_is_neither_argument_nor_output() -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in scan_inputs(SMALL, SETUP.device).items()}
    leaves = list(inputs.values())
    states = kept_bytes(Contender("", lambda: selective_scan(**inputs), leaves))
    assert states == 1 * 1 * 3 * 16 * 4  # of one segment, in fp32
    assert kept_bytes(Contender("", lambda: inputs["u"].exp(), leaves)) == 0


def test_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "tiny", LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16))
    ours = [row for row in rows(models.model, ModelCase(preset="tiny", batch=1, length=8)) if "note" not in row]
    assert [row["what"] for row in ours] == ["training", "prefill"]
    mamba, transformer = rows(models.blocks, LENGTH)
    assert set(mamba) == set(transformer) == {"case", "batch", "who"} | TIMES


def test_blocks_are_of_a_size() -> None:
    sizes = [sum(p.numel() for p in made.parameters()) for made in (TwoBlocks(256), TransformerLayer(256, 64))]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.15)


def test_the_host() -> None:
    case = CallCase(name="tiny", scan=SMALL)
    ours = [row for row in rows(host.host, case) if "note" not in row]
    assert {(row["what"], row["pass"]) for row in ours} == {
        *((what, name) for what in ("scan", "conv", "norm") for name in ("forward", "forward+backward")),
        *((f"{what} step", "forward") for what in ("scan", "conv")),
    }


@pytest.mark.slow
def test_the_first_call_of_a_process() -> None:
    cold, warm = rows(host.first_call, CallCase(name="scan", scan=SMALL))
    assert (cold["cache"], warm["cache"]) == ("cold", "warm")
    assert set(cold) == {"case", "cache", "forward ms", "backward ms"}


def test_lengths_are_timed_and_drawn(tmp_path: Path) -> None:
    found = rows(lengths.lengths, LENGTH)
    assert {row["who"] for row in found} == {"scan", "scan in plain torch", "mamba_ssm", "attention"}
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    lengths.draw(found, tmp_path / "lengths.svg")
    drawn = (tmp_path / "lengths.svg").read_text()
    assert "scan in plain torch, forward<" in drawn
    assert "mamba_ssm" not in drawn


def test_every_subject_has_cases() -> None:
    assert all(cases for cases, _ in ON_GPU.values())


def test_slow_calls_are_timed_less_often() -> None:
    calls: list[int] = []
    assert time_of(lambda: calls.append(1), SETUP).gpu < 1e-3
    often = len(calls)
    calls.clear()
    assert host_seconds(lambda: calls.append(1), SETUP, calls=10) < 1e-3
    assert (often, len(calls)) == (3, 11)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_gpu_has_a_clock_of_its_own() -> None:
    x = torch.zeros(2**26, device="cuda")
    time = time_of(lambda: x.add_(1), Setup(device=x.device, rounds=3))
    assert 0 < time.gpu < time.wall
