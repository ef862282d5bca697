"""``selective-ssm reproduce``: every recipe for a few steps, interrupted and gone on with."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from selective_ssm.cli import main, reproduce
from selective_ssm.cli.parser import Parser
from selective_ssm.experiments.run import Training, steps_of
from selective_ssm.files import read_json
from selective_ssm.recipes import cell_path, cells

TABLES = {
    "table1": "task={kind: selective_copying, length: 24, vocab_size: 16, items: 4}",
    "table2": "task={kind: induction_heads, length: 16, vocab_size: 16}",
}
QUICK = ["batch_size=2", "test_rows=2", "test_lengths=[32]", "far_length=null", "learning_rates=[0.001]", "seeds=1"]
CELLS = [(table, cell) for table in TABLES for cell in cells(table)]


def words(table: str, cell: str, output: Path) -> list[str]:
    settings = [word for setting in (*QUICK, TABLES[table]) for word in ("--set", setting)]
    return ["reproduce", table, "--cell", cell, "--budget", "3", "--output", str(output), *settings]


@pytest.mark.parametrize(("table", "cell"), CELLS)
def test_every_recipe_runs(table: str, cell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cell_path(table, cell).read_text().startswith("# ")
    assert main(words(table, cell, tmp_path)) == 0
    told = capsys.readouterr().out
    assert f"{cell} lr-0.001-seed-0:" in told
    assert "done" in told
    summary = read_json(tmp_path / table / f"{cell}.json")
    assert summary["config"]["steps"] == 3
    assert summary["versions"]["torch"]


def test_runs_are_packed_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = words("table2", "mamba", tmp_path / "here")
    assert main([*given, "--minutes", "1e-9"]) == 0
    assert "not run" in capsys.readouterr().out
    assert main([*given, "--pack", str(tmp_path / "left.tar.xz")]) == 0
    assert "0 runs written" in capsys.readouterr().out
    assert main([*given, "--unpack", str(tmp_path / "left.tar.xz")]) == 0
    assert "0 runs taken" in capsys.readouterr().out


def test_ctrl_c_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn = Training.learn

    def interrupted(training: Training) -> None:
        learn(training)
        if training.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    given = words("table2", "mamba", tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Training, "learn", interrupted)
        assert main(given) == 130
    assert steps_of(tmp_path / "table2" / "mamba" / "lr-0.001-seed-0") == 2
    assert main(given) == 0
    assert read_json(tmp_path / "table2" / "mamba.json")["runs"][0]["steps"] == 3


@pytest.mark.parametrize("code", [0, 3])
def test_every_gpu_has_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **options: object) -> None:
            started.append(command)

        def wait(self) -> int:
            return code

    given = [*words("table2", "mamba", tmp_path), "--device", "cuda", "--plot", "true"]
    monkeypatch.setattr("sys.argv", ["selective-ssm", *given])
    monkeypatch.setattr("selective_ssm.cli.reproduce.usable_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("subprocess.Popen", Process)
    monkeypatch.setattr("selective_ssm.cli.reproduce._about", lambda device: {})
    monkeypatch.setattr("selective_ssm.experiments.tables.draw", lambda table, cells, path: None)
    assert main(given) == (0 if code == 0 else 2)
    assert [command[-2:] for command in started] == [["--device", "cuda:0"], ["--device", "cuda:1"]]
    for command in started:
        options = _parser().parse_words(command[4:])
        assert not options.plot, "drawn by the one that started them"
        assert options.device == command[-1]
    assert code == 0 or "the processes of GPUs 0, 1 failed" in capsys.readouterr().err


def test_one_key_of_a_cell_s_task_can_be_set(tmp_path: Path) -> None:
    settings = [word for setting in (*QUICK, "task.length=24") for word in ("--set", setting)]
    given = ["reproduce", "table2", "--cell", "mamba", "--budget", "1", "--output", str(tmp_path), *settings]
    assert main(given) == 0
    task = read_json(tmp_path / "table2" / "mamba.json")["config"]["task"]
    assert (task["kind"], task["length"], task["vocab_size"]) == ("induction_heads", 24, 16)


def test_a_cell_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "table1", "--cell", "mamba-s7"]) == 2
    assert "did you mean 'mamba-s6'" in capsys.readouterr().err


def _parser() -> Parser:
    parser = Parser("reproduce", "")
    reproduce.add_arguments(parser)
    return parser
