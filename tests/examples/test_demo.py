"""The demo, at a handful of steps."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
GLIMPSE = ["--trainer.max_steps", "3", "--data.row_length", "64", "--data.held_out_bytes", "3000"]


def test_the_demo_trains_compares_plots_resumes_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(DEMO))["main"](GLIMPSE)
    printed = capsys.readouterr().out
    for told in ("the standard library of", "files, ", "gzip -9", "xz -9e", "mamba", "at step 3 for five more"):
        assert told in printed
    assert (tmp_path / "runs" / "demo" / "last").resolve().name == "step-00000008"
    assert (tmp_path / "runs" / "demo" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(printed.rpartition("--temperature 0.7\n")[2]) > 100
