"""``selective-ssm bench``: a table on the screen, the same figures as JSON."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from selective_ssm.bench import run, subjects
from selective_ssm.bench.cases import ModelCase, OpCase, Setup
from selective_ssm.bench.run import Row
from selective_ssm.cli import main
from selective_ssm.files import read_json
from selective_ssm.models import presets
from selective_ssm.models.config import LanguageModelConfig


@pytest.fixture(autouse=True)
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16)
    monkeypatch.setitem(presets.PRESETS, "tiny", tiny)
    sequence = OpCase(batch=1, length=8, channels=4, states=3, against_loop=True)
    token = OpCase(batch=2, length=1, channels=4, states=3)
    language_model = ModelCase(preset="tiny", batch=1, length=8, new_tokens=2)
    for subject, case in (("scan", sequence), ("conv", sequence), ("step", token), ("model", language_model)):
        monkeypatch.setitem(run.SUBJECTS, subject, ((case,), run.SUBJECTS[subject][1]))
    monkeypatch.setattr(subjects, "ON_CPU", run.SUBJECTS)


@pytest.mark.parametrize(
    ("subject", "columns"),
    [
        ("scan", {"case", "pass", "backend", "ms", "loop ms", "speed-up"}),
        ("conv", {"case", "pass", "backend", "ms"}),
        ("step", {"case", "backend", "µs"}),
        ("model", {"case", "what", "ms", "tokens a second"}),
    ],
)
def test_figures_go_to_the_screen_and_to_a_file(
    subject: str, columns: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELECTIVE_SSM_COMMIT", "abc123")
    assert main(["bench", subject, "--rounds", "1", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    written = read_json(tmp_path / "cpu" / f"{subject}.json")
    assert written["commit"] == "abc123"
    assert written["machine"]["cores"] > 0
    assert written["versions"]["torch"]
    assert written["results"]
    for row in written["results"]:
        assert set(row) == columns
        assert row["case"] in shown
        assert all(value > 0 for value in row.values() if isinstance(value, float))


def test_an_interruption_loses_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["bench", "scan", "--rounds", "1", "--output", str(tmp_path)]
    assert main(words) == 0
    whole = read_json(tmp_path / "cpu" / "scan.json")

    def timed(case: OpCase, setup: Setup) -> Iterator[Row]:
        yield {"case": case.name, "ms": 1.0}
        raise KeyboardInterrupt

    case = OpCase(batch=1, length=8, channels=4, states=3)
    monkeypatch.setitem(run.SUBJECTS, "scan", ((case,), timed))
    assert main(words) == 128 + signal.SIGINT
    assert read_json(tmp_path / "cpu" / "scan-cut.json")["results"] == [{"case": case.name, "ms": 1.0}]
    assert read_json(tmp_path / "cpu" / "scan.json") == whole
    assert "scan-cut on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["host"], "'host' is timed on a GPU only, and the device is 'cpu': give --device cuda"),
        (["neighbours"], "'neighbours' is timed on a GPU only, and the device is 'cpu': give --device cuda"),
        (["generate"], "'generate' is timed on a GPU only, and the device is 'cpu': give --device cuda"),
        (["scan", "--peer", "sdpa,mamba"], "peer must be one of 'transformers', 'mambapy', got 'sdpa'"),
        (["scan", "--plan", "lanes=3"], "--plan has 'lanes=3'; expected for lanes one of 2, 4, 8"),
        (["scan", "--plan", "pieces"], "--plan has 'pieces'; expected for pieces a positive number"),
        (["scan", "--plot", "true"], "only 'lengths', 'generate' can be drawn, not 'scan'"),
    ],
)
def test_what_cannot_be_timed_or_drawn_is_told(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_an_unknown_case_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scan", "--case", "1x8x4"]) == 2
    assert "did you mean '1x8x4x3'?" in capsys.readouterr().err
