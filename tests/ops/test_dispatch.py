"""What can run here, and why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selective_ssm.ops import dispatch
from selective_ssm.ops.dispatch import Case, choose, explain

CASE = Case(op="causal_conv1d", device="cpu", dtype=torch.float32, complex_state=False)


@pytest.fixture(autouse=True)
def without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.native, "explain", lambda: "it was not built")


@pytest.fixture
def with_a_fussy_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def fussy(case: Case) -> str | None:
        return "it takes bfloat16 only" if case.dtype != torch.bfloat16 else None

    monkeypatch.setattr(dispatch, "BACKENDS", {"fussy": fussy, **dispatch.BACKENDS})


@pytest.mark.usefixtures("with_a_fussy_backend")
def test_the_fastest_that_can_run_is_chosen() -> None:
    assert choose(CASE, environment={}) == "reference"
    assert choose(CASE._replace(dtype=torch.bfloat16), environment={}) == "fussy"
    assert explain(CASE) == {
        "fussy": "it takes bfloat16 only",
        "cuda": "it takes tensors on a CUDA device",
        "cpu": "it was not built",
        "reference": None,
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "this machine has none"),
        ({"dtype": torch.float64}, "it computes in float32, not in float64"),
        ({"complex_state": True}, "it takes no complex state"),
        ({"device": "cpu"}, "it takes tensors on a CUDA device"),
    ],
)
def test_why_there_is_no_cuda(changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.nvrtc, "explain", lambda: "this machine has none")
    case = CASE._replace(device="cuda")._replace(**changes)
    assert choose(case, environment={}) == "reference"
    with pytest.raises(ValueError, match=f"'cuda' cannot run causal_conv1d here: {reason}"):
        choose(case, "cuda", {})
    monkeypatch.setattr(dispatch.nvrtc, "explain", lambda: None)
    assert choose(case, environment={}) == ("reference" if changes else "cuda")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "it was not built"),
        ({"dtype": torch.float64}, "it takes float32 and bfloat16, not float64"),
        ({"dtype": torch.float16}, "it takes float32 and bfloat16, not float16"),
        ({"complex_state": True}, "it takes no complex state"),
        ({"device": "cuda"}, "it takes tensors on a CPU"),
        ({"op": "attention"}, "it has no kernel for attention"),
    ],
)
def test_why_there_is_no_cpu_kernel(changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.nvrtc, "explain", lambda: "this machine has none")
    case = CASE._replace(**changes)
    assert choose(case, environment={}) == "reference"
    with pytest.raises(ValueError, match=f"'cpu' cannot run {case.op} here: {reason}"):
        choose(case, "cpu", {})
    monkeypatch.setattr(dispatch.native, "explain", lambda: None)
    assert choose(case, environment={}) == ("reference" if changes else "cpu")


@pytest.mark.usefixtures("with_a_fussy_backend")
@pytest.mark.parametrize(("backend", "environment"), [("fussy", {}), (None, {"SELECTIVE_SSM_BACKEND": "fussy"})])
def test_one_asked_for_is_never_replaced(backend: str | None, environment: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="'fussy' cannot run causal_conv1d here: it takes bfloat16 only"):
        choose(CASE, backend, environment)


def test_an_argument_goes_before_the_environment() -> None:
    assert choose(CASE, "reference", {"SELECTIVE_SSM_BACKEND": "nonsense"}) == "reference"
    with pytest.raises(ValueError, match="'nonsense' does not exist"):
        choose(CASE, None, {"SELECTIVE_SSM_BACKEND": "nonsense"})
