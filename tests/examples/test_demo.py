"""The demo, as short as its docstring offers it."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
SMALL_DATA = ["--data.row_length", "64", "--data.held_out_bytes", "3000"]


def test_the_demo_trains_compares_plots_resumes_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    monkeypatch.chdir(tmp_path)
    demo = runpy.run_path(str(DEMO))
    glimpse = re.search(r"demo\.py (--.*\S) +a glimpse", demo["__doc__"])
    assert glimpse is not None
    demo["main"]([*glimpse[1].split(), *SMALL_DATA])
    printed = capsys.readouterr().out
    for told in ("the standard library of", "files, ", "gzip -9", "xz -9e", "mamba", "at step 20 for five more"):
        assert told in printed
    assert (tmp_path / "runs" / "demo" / "last").resolve().name == "step-00000025"
    assert (tmp_path / "runs" / "demo" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(printed.rpartition("--temperature 0.7\n")[2]) > 100


def test_without_matplotlib_the_demo_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(DEMO)])
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"pip install 'selective-ssm\[plots\]'"):
        runpy.run_path(str(DEMO), run_name="__main__")
