"""The figures of a run in a CSV file, each step exactly once however often the run was resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

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


class CSVMetrics(Logger):
    """Appends a row for each step it is given; numbers are written exactly, so that runs can be compared bit by bit.

    Args:
        path: the file; it is made, or cut back to what it held at ``step``.
        step: the last step whose row stays; 0 begins anew.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        super().__init__()
        self._path = path
        rows = read_text(path).splitlines(keepends=True)[1:] if path.exists() else []
        whole = [row for row in rows if row.endswith("\n")]  # a killed process may have begun one more
        kept = [row for row in whole if int(row.partition(",")[0]) <= step]
        write_text(path, "".join([",".join(COLUMNS) + "\n", *kept]))

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
