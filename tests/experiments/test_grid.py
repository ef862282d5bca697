"""Working through cells, packing what is left, and the table."""

from __future__ import annotations

import io
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from selective_ssm.errors import FileProblem, UserError
from selective_ssm.experiments import archive, tables
from selective_ssm.experiments.cell import Run
from selective_ssm.experiments.grid import Cell, work_through, write_summary
from selective_ssm.experiments.run import STATE, go_on
from selective_ssm.files import read_json, write_json
from selective_ssm.tasks import Share

CPU = torch.device("cpu")


def shown(cells: list[Cell], table: str = "table2") -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as captured:
        console.print(tables.laid_out(tables.TABLES[table], cells))
    return captured.get()


def finish(cell: Cell) -> list[str]:
    told: list[str] = []
    work_through({cell.name: cell}, CPU, until=lambda: False, told=told.append)
    return told


def test_all_runs_are_done_and_told(cell: Cell) -> None:
    told = finish(cell)
    assert len(told) == 3, "two rates, and another seed of the better"
    assert all(line.startswith("tiny lr-") and "% in " in line for line in told)
    assert finish(cell) == []
    summary = read_json(write_summary(cell, {"commit": "abc"}))
    assert summary["commit"] == "abc"
    assert len(summary["runs"]) == 3
    assert summary["learning rate"] in (1e-2, 1e-3)
    spread = summary["tests"]["16"]["tokens"]
    assert 0 <= spread["least"] <= spread["mean"] <= spread["most"] <= 1
    assert spread["all"] == 2 * cell.config.test_rows, "two seeds"
    low, high = spread["interval"]
    assert low <= spread["right"] / spread["all"] <= high


def test_the_best_rate_is_that_which_does_best_over_all_lengths(cell: Cell) -> None:
    for rate, far in ((1e-3, 7), (1e-2, 2)):
        shares = {"8": 8, "16": far, "64": 0}
        tests = {length: {"tokens": asdict(Share(right=right, all=8))} for length, right in shares.items()}
        folder = cell.folder / Run(rate, 0).name
        folder.mkdir(parents=True)
        write_json(folder / "result.json", {"tests": tests})
    assert cell.wanted() == [Run(1e-3, 1)]


def test_a_rate_at_which_the_loss_runs_away_is_one_that_did_not_do_well(cell: Cell) -> None:
    config = replace(cell.config, learning_rates=(1e30, 1e-2), optimizer=replace(cell.config.optimizer, clip=None))
    cell = replace(cell, config=config)
    told = finish(cell)
    assert "its loss ran away by step" in told[0]
    assert cell.summary()["learning rate"] == 1e-2


def test_time_that_is_up_stops_it_in_the_middle(cell: Cell) -> None:
    asked = iter([*[False] * 12, *[True] * 100])
    work_through({"tiny": cell}, CPU, until=lambda: next(asked), told=lambda line: None)
    assert len(cell.results()) == 1
    assert cell.steps() > 0
    assert "1 runs done" in shown([cell])
    assert len(finish(cell)) == 2


def test_a_run_of_others_is_left_to_them(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(config: object, run: Run, folder: Path, *args: object, **options: object) -> bool:
        raise FileProblem("another process trains there")

    monkeypatch.setattr("selective_ssm.experiments.grid.go_on", held)
    assert finish(cell) == [f"tiny {run.name} is left out: another process trains there" for run in cell.wanted()]


def test_the_table_tells_what_was_not_run(cell: Cell) -> None:
    assert "not run" in shown([cell])
    finish(cell)
    text = shown([cell])
    assert "done" in text
    assert "100" in text
    assert "16" in text
    assert "whole rows" in shown([cell], "table1")
    console = Console(width=200, file=io.StringIO())
    with console.capture() as captured:
        console.print(tables.counted([cell]))
    assert [line.split("│")[2].strip() for line in captured.get().splitlines() if "tiny" in line] == ["8", "16", "64"]


def test_curves_are_drawn(cell: Cell, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    finish(cell)
    other = replace(cell, name="absent", folder=tmp_path / "none")
    for name, table in tables.TABLES.items():
        tables.draw(table, [cell, other], tmp_path / f"{name}.svg")
        drawn = (tmp_path / f"{name}.svg").read_text()
        assert ">tiny<" in drawn
        assert ">absent<" not in drawn


def test_a_curve_is_of_one_seed_at_the_rate_that_did_best(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    finish(cell)
    figures: list[Any] = []
    monkeypatch.setattr(tables.plots, "save", lambda figure, path: figures.append(figure))
    tables.draw(tables.TABLES["table2"], [cell], Path("unused.svg"))
    drawn = [list(line.get_ydata()) for line in figures[0].axes[0].lines]
    rate = cell.summary()["learning rate"]
    judged = [result for run, result in sorted(cell.results().items()) if run.learning_rate == rate]
    assert len(judged) == 2
    assert drawn == [[100 * Share(**test["tokens"]).value for test in one["tests"].values()] for one in judged]


def test_runs_go_on_elsewhere(cell: Cell, tmp_path: Path) -> None:
    assert not go_on(cell.config, Run(1e-2, 0), cell.folder / Run(1e-2, 0).name, CPU, until=lambda: True)
    go_on(cell.config, Run(1e-3, 0), cell.folder / Run(1e-3, 0).name, CPU, until=lambda: False)
    assert archive.pack([cell], tmp_path / "left.tar.xz", cell.folder.parent) == 2
    there = replace(cell, folder=tmp_path / "there" / "tiny")
    assert archive.unpack(tmp_path / "left.tar.xz", there.folder.parent) == 2
    assert archive.unpack(tmp_path / "left.tar.xz", there.folder.parent) == 0, "what is there stays"
    assert (there.steps(), len(there.results())) == (1, 1)
    assert len(finish(there)) == 2
    finish(cell)
    assert archive.pack([cell], tmp_path / "none.tar.xz", cell.folder.parent) == 0, "what is done stays here"


def test_of_two_states_the_one_that_is_further_on_stays(cell: Cell, tmp_path: Path) -> None:
    run = Run(1e-2, 0)
    there = replace(cell, folder=tmp_path / "there" / "tiny")

    def step(where: Cell) -> None:
        go_on(where.config, run, where.folder / run.name, CPU, until=lambda: True)

    step(cell)
    archive.pack([cell], tmp_path / "begun.tar.xz", cell.folder.parent)
    archive.unpack(tmp_path / "begun.tar.xz", there.folder.parent)
    step(there)
    archive.pack([there], tmp_path / "further.tar.xz", there.folder.parent)
    assert archive.unpack(tmp_path / "further.tar.xz", cell.folder.parent) == 1
    assert archive.unpack(tmp_path / "begun.tar.xz", cell.folder.parent) == 0
    assert cell.steps() == 2


def test_an_archive_is_small(cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 100)
    go_on(cell.config, Run(1e-2, 0), cell.folder / Run(1e-2, 0).name, CPU, until=lambda: True)
    with pytest.raises(UserError, match="name fewer cells"):
        archive.pack([cell], tmp_path / "left.tar.xz", cell.folder.parent)
    assert not (tmp_path / "left.tar.xz").exists()


@pytest.mark.parametrize("name", ["../../state.safetensors", "tiny/notes.txt", "/tmp/state.safetensors"])
def test_an_archive_writes_nothing_but_runs(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "made.tar.xz", "w:xz") as made:
        made.addfile(tarfile.TarInfo(name))
    with pytest.raises(FileProblem, match="not an archive of runs"):
        archive.unpack(tmp_path / "made.tar.xz", tmp_path / "inside" / "deep")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.tar.xz"]


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(b"nothing of the kind")
    with pytest.raises(FileProblem, match="not a whole archive of runs"):
        archive.unpack(tmp_path / STATE, tmp_path)
    with pytest.raises(FileProblem, match="there is no such file"):
        archive.unpack(tmp_path / "none", tmp_path)
