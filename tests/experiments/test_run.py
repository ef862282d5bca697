"""A run that is interrupted comes to what it would have come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from selective_ssm.errors import FileProblem
from selective_ssm.experiments.cell import CellConfig, Run
from selective_ssm.experiments.run import RESULT, STATE, go_on, result_of, steps_of
from selective_ssm.files import owned
from tests.experiments.conftest import TINY, needs_gpu

RUN = Run(1e-2, 1)
CPU = torch.device("cpu")


def never() -> bool:
    return False


def after(steps: int) -> Callable[[], bool]:
    """Time is up after so many steps."""
    asked = iter([*[False] * (steps - 1), *[True] * 100])
    return lambda: next(asked)


def without_time(result: dict[str, Any] | None) -> dict[str, Any]:
    assert result is not None
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=needs_gpu)], ids=str)
@pytest.mark.parametrize("at", [1, 3, 5])
def test_an_interruption_changes_nothing(tmp_path: Path, at: int, device: torch.device) -> None:
    cell = replace(TINY, steps=103)  # a look every other step, the last one alone
    assert go_on(cell, RUN, tmp_path / "whole", device, until=never)
    assert not go_on(cell, RUN, tmp_path / "cut", device, until=after(at))
    assert steps_of(tmp_path / "cut") == at
    assert result_of(tmp_path / "cut") is None
    assert not go_on(cell, RUN, tmp_path / "cut", device, until=after(2))
    assert steps_of(tmp_path / "cut") == at + 2
    assert go_on(cell, RUN, tmp_path / "cut", device, until=never)
    assert without_time(result_of(tmp_path / "cut")) == without_time(result_of(tmp_path / "whole"))
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["lock", RESULT]


def test_tests_are_interrupted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selective_ssm.experiments.examination._ROWS_DRAWN", 3)
    assert go_on(TINY, RUN, tmp_path / "whole", CPU, until=never)
    parts = 2 * 3 + 1  # eight rows at each of two lengths, two at a far one
    for part in range(parts - 1):
        assert not go_on(TINY, RUN, tmp_path / "cut", CPU, until=after(TINY.steps + 1 if part == 0 else 1))
    assert go_on(TINY, RUN, tmp_path / "cut", CPU, until=after(1)), "the last part"
    assert without_time(result_of(tmp_path / "cut")) == without_time(result_of(tmp_path / "whole"))


def test_what_a_result_holds(tmp_path: Path) -> None:
    assert go_on(TINY, RUN, tmp_path, CPU, until=never)
    result = result_of(tmp_path)
    assert result is not None
    assert (result["learning_rate"], result["seed"], result["steps"]) == (1e-2, 1, 6)
    assert [look["step"] for look in result["looks"]] == [1, 2, 3, 4, 5, 6]
    rows = {length: test["sequences"]["all"] for length, test in result["tests"].items()}
    assert rows == {"8": TINY.test_rows, "16": TINY.test_rows, "64": TINY.far_rows}
    assert go_on(TINY, RUN, tmp_path, CPU, until=never), "done is done"


def test_a_task_is_learned(tmp_path: Path) -> None:
    cell = replace(TINY, steps=150, batch_size=32, test_rows=64)
    assert go_on(cell, RUN, tmp_path, CPU, until=never)
    result = result_of(tmp_path)
    assert result is not None
    assert result["looks"][-1]["loss"] < 0.8 * result["looks"][0]["loss"]


def test_saved_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed loses no more than a minute."""
    monkeypatch.setattr("selective_ssm.experiments.run._SAVE_SECONDS", 0.0)
    killed = iter([False] * 4)
    with pytest.raises(StopIteration):
        go_on(TINY, RUN, tmp_path, CPU, until=lambda: next(killed))
    assert steps_of(tmp_path) == 4


def test_what_is_of_another_run_is_refused(tmp_path: Path) -> None:
    assert not go_on(TINY, RUN, tmp_path, CPU, until=after(1))
    others: list[tuple[CellConfig, Run]] = [(replace(TINY, batch_size=5), RUN), (TINY, Run(1e-2, 0))]
    for cell, run in others:
        with pytest.raises(FileProblem, match="is of another run"):
            go_on(cell, run, tmp_path, CPU, until=never)
    (tmp_path / STATE).write_bytes(b"no state")
    with pytest.raises(FileProblem, match="not a whole safetensors file"):
        go_on(TINY, RUN, tmp_path, CPU, until=never)


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    """Locks are between processes, so one that is held by this process is made to look like another's."""
    with owned(tmp_path / "lock", taken="taken"), pytest.MonkeyPatch.context() as patch:

        def refuse(descriptor: int) -> None:
            raise BlockingIOError

        patch.setattr("selective_ssm.files._own", refuse)
        with pytest.raises(FileProblem, match="another process trains in"):
            go_on(TINY, RUN, tmp_path, CPU, until=never)


def test_a_loss_that_runs_away_ends_its_run(tmp_path: Path) -> None:
    wild = replace(TINY, steps=500, optimizer=replace(TINY.optimizer, clip=None))
    assert go_on(wild, Run(1e30, 0), tmp_path, CPU, until=never)
    result = result_of(tmp_path)
    assert result is not None
    assert result["ran away"]
    assert result["steps"] < 50
    assert [test["tokens"]["right"] for test in result["tests"].values()] == [0, 0, 0]
