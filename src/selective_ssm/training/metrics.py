"""The figures of a run in a CSV file, each step exactly once however often the run was resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from selective_ssm.errors import FileProblem
from selective_ssm.files import in_words, read_text, write_text

COLUMNS = (
    "step",
    "tokens",
    "seconds",
    "learning_rate",
    "gradient_norm",
    "loss",
    "bits_per_byte",
    "held_out_bits_per_byte",
    "tokens_per_second",
)
"""``tokens`` and ``seconds`` count from the run's beginning; losses are in nats a token."""

_HEADER = ",".join(COLUMNS) + "\n"


class CSVMetrics(Logger):
    """Appends a row for each step it is given; numbers are written exactly, so that runs can be compared bit by bit.

    Args:
        path: the file; it is made, or cut back to what it held at ``step``.
        step: the last step whose row stays; 0 begins anew.

    Raises:
        FileProblem: the file cannot be written, or holds something else than a run's figures.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        super().__init__()
        self._path = path
        rows = _rows(path) if path.exists() else []
        write_text(path, "".join([_HEADER, *(row for one, row in rows if one <= step)]))

    @property
    def name(self) -> str:
        return self._path.stem

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        with in_words("write", self._path), open(self._path, "a") as file:
            file.write(",".join(str(row.get(column, "")) for column in COLUMNS) + "\n")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run's folder holds the whole config already."""


def _rows(path: Path) -> list[tuple[int, str]]:
    """The whole rows of the file with their steps; a killed process may have begun one more."""
    lines = read_text(path).splitlines(keepends=True)
    if lines[:1] != [_HEADER]:
        raise FileProblem(f"'{path}' does not hold a run's figures: move it away, or choose another output folder")
    rows: list[tuple[int, str]] = []
    for number, row in enumerate(lines[1:], start=2):
        step = row.partition(",")[0]
        if row.endswith("\n"):
            if not step.isdecimal():
                raise FileProblem(f"line {number} of '{path}' is no row of a run's figures: remove that line")
            rows.append((int(step), row))
    return rows
