"""What can run here, and why not."""

from __future__ import annotations

import pytest
import torch

from selective_ssm.ops import dispatch
from selective_ssm.ops.dispatch import Case, choose, explain

CASE = Case(op="selective_scan", device="cpu", dtype=torch.float32, complex_state=False)


@pytest.fixture
def with_a_fussy_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def fussy(case: Case) -> str | None:
        return "it takes bfloat16 only" if case.dtype != torch.bfloat16 else None

    monkeypatch.setattr(dispatch, "BACKENDS", {"fussy": fussy, **dispatch.BACKENDS})


@pytest.mark.usefixtures("with_a_fussy_backend")
def test_the_fastest_that_can_run_is_chosen() -> None:
    assert choose(CASE, environment={}) == "reference"
    assert choose(CASE._replace(dtype=torch.bfloat16), environment={}) == "fussy"
    assert explain(CASE) == {"fussy": "it takes bfloat16 only", "reference": None}


@pytest.mark.usefixtures("with_a_fussy_backend")
@pytest.mark.parametrize(("backend", "environment"), [("fussy", {}), (None, {"SELECTIVE_SSM_BACKEND": "fussy"})])
def test_one_asked_for_is_never_replaced(backend: str | None, environment: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="'fussy' cannot run selective_scan here: it takes bfloat16 only"):
        choose(CASE, backend, environment)


def test_an_argument_goes_before_the_environment() -> None:
    assert choose(CASE, "reference", {"SELECTIVE_SSM_BACKEND": "nonsense"}) == "reference"
    with pytest.raises(ValueError, match="'nonsense' does not exist"):
        choose(CASE, None, {"SELECTIVE_SSM_BACKEND": "nonsense"})
