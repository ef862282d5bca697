"""``selective-ssm doctor``: every backend of every op, and how exact it is."""

from __future__ import annotations

import re

import pytest
import torch

from selective_ssm.cli import doctor, main


def test_it_tells_versions_and_an_error_as_small_as_the_dtype_allows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert re.search(r"CPU library\s+│ (loaded \(.*1 thread of|the CPU library|there is no)", shown)
    for dtype, eps in (("fp32", 1e-6), ("bf16", 1e-2), ("fp16", 2e-3)):
        errors = re.findall(rf"{dtype}.*reference.*error (\S+)", shown)
        assert len(errors) >= 2
        assert all(0 < float(error) < eps for error in errors)


def test_what_cannot_run_is_told_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "explain", lambda case: {"fast": "no such chip", "reference": None})
    assert main(["doctor"]) == 0
    assert re.search(r"fast\s+│ no such chip", capsys.readouterr().out)


def test_an_absent_library_is_told_with_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(doctor.native, "explain", lambda: "it was not built: install a C++ compiler")
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"CPU library\s+│ it was not built: install a C\+\+ compiler", shown)
    assert re.search(r"causal_conv1d\s+│ fp32\s+│ cpu\s+│ it was not built", shown)
