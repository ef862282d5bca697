"""The metrics file."""

from __future__ import annotations

from pathlib import Path

import pytest

from selective_ssm.errors import FileProblem
from selective_ssm.training.metrics import CSVMetrics


def steps(path: Path) -> list[str]:
    return [line.partition(",")[0] for line in path.read_text().splitlines()[1:]]


def test_resuming_cuts_the_file_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.csv"
    metrics = CSVMetrics(path, step=0)
    for step in (1, 2, 10, 11, 12):
        metrics.log_metrics({"loss": 1 / 3}, step)
    with open(path, "a") as file:
        file.write("1")  # a row that a killed process had begun to write
    CSVMetrics(path, step=10).log_metrics({"loss": 0.1 + 0.2}, 11)
    assert steps(path) == ["1", "2", "10", "11"]
    losses = [float(line.split(",")[5]) for line in path.read_text().splitlines()[1:]]
    assert losses == [1 / 3, 1 / 3, 1 / 3, 0.1 + 0.2]
    CSVMetrics(path, step=0)
    assert steps(path) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileProblem, match=r"metrics\.csv"):
        CSVMetrics(tmp_path / "file" / "metrics.csv", step=0)


def test_a_file_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,accuracy\n1,0.5\n")
    with pytest.raises(FileProblem, match="another output folder"):
        CSVMetrics(path, step=0)
    assert path.read_text() == "epoch,accuracy\n1,0.5\n"


def test_a_foreign_line_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    CSVMetrics(path, step=0).log_metrics({"loss": 1.0}, 1)
    with open(path, "a") as file:
        file.write("looks good so far\n")
    with pytest.raises(FileProblem, match=r"line 3 of '.*metrics\.csv'"):
        CSVMetrics(path, step=1)
