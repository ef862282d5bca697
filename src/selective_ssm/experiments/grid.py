"""A table's cells, run by run, in a folder: what is done, what is left, and working through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from selective_ssm.config import to_tagged
from selective_ssm.errors import FileProblem
from selective_ssm.experiments.cell import CellConfig, Run, judged_by, wanted
from selective_ssm.experiments.run import go_on, result_of, steps_of
from selective_ssm.files import write_json
from selective_ssm.tasks import Share


@dataclass(frozen=True)
class Cell:
    """A cell of a table and the folder of its runs.

    Args:
        name: what it is called.
        config: what it consists of.
        folder: where its runs are.
    """

    name: str
    config: CellConfig
    folder: Path

    def results(self) -> dict[Run, dict[str, Any]]:
        """What the runs that are done came to."""
        found = {run: result_of(self.folder / run.name) for run in self.runs()}
        return {run: result for run, result in found.items() if result is not None}

    def runs(self) -> list[Run]:
        """All runs that may be needed."""
        return [Run(rate, seed) for rate in self.config.learning_rates for seed in range(self.config.seeds)]

    def wanted(self) -> list[Run]:
        """The runs that can be done now; none where all is done."""
        return wanted(self.config, _scores(self.results()))

    def steps(self) -> int:
        """Steps behind runs that are not done."""
        return sum(steps_of(self.folder / run.name) for run in self.runs())

    def summary(self) -> dict[str, Any]:
        """All that is known of it, as plain data; with the figures of the runs that speak for it, if it is done."""
        results = self.results()
        known = {"cell": self.name, "config": to_tagged(self.config), "runs": list(results.values())}
        if self.wanted():
            return known
        judged = [results[run] for run in judged_by(self.config, _scores(results))]
        return known | {
            "learning rate": judged[0]["learning_rate"],
            "tests": {length: _spread([one["tests"][length] for one in judged]) for length in judged[0]["tests"]},
        }


def work_through(
    cells: Mapping[str, Cell], device: torch.device, *, until: Callable[[], bool], told: Callable[[str], None]
) -> None:
    """Do the runs that are wanted, one after the other, until all are done, others do the rest, or time is up.

    Several processes may share the work: a run belongs to the one that holds its lock.

    Args:
        cells: by name.
        device: where to train.
        until: whether time is up.
        told: takes a line for each run that is done.
    """
    taken: set[Path] = set()  # by others
    while (place := next(_left(cells, taken), None)) is not None and not until():
        cell, run = place
        folder = cell.folder / run.name
        try:
            if go_on(cell.config, run, folder, device, until=until):
                result = result_of(folder)
                assert result is not None
                end = f"; its loss ran away by step {result['steps']:,}" if result["ran away"] else ""
                share, minutes = 100 * _score(result), result["seconds"] / 60
                told(f"{cell.name} {run.name}: {share:.2f} % in {minutes:.1f} minutes{end}")
        except FileProblem as problem:
            told(f"{cell.name} {run.name} is left out: {problem}")
            taken.add(folder)


def write_summary(cell: Cell, about: Mapping[str, Any]) -> Path:
    """Write what is known of a cell as JSON beside its folder, and where the figures come from."""
    path = cell.folder.with_suffix(".json")
    write_json(path, {**cell.summary(), **about})
    return path


def _left(cells: Mapping[str, Cell], taken: set[Path]) -> Iterator[tuple[Cell, Run]]:
    for cell in cells.values():
        for run in cell.wanted():
            if cell.folder / run.name not in taken:
                yield cell, run


def _scores(results: Mapping[Run, Mapping[str, Any]]) -> dict[Run, float]:
    return {run: _score(result) for run, result in results.items()}


def _score(result: Mapping[str, Any]) -> float:
    """The share of right answers, the mean over all lengths."""
    return mean(Share(**test["tokens"]).value for test in result["tests"].values())


def _spread(tests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the seeds come to together, with its 95 % interval, and the mean, least and largest share among them."""
    spread: dict[str, dict[str, Any]] = {}
    for what in ("tokens", "sequences"):
        shares = [Share(**one[what]) for one in tests]
        values, together = [share.value for share in shares], sum(shares[1:], shares[0])
        found = {"mean": mean(values), "least": min(values), "most": max(values)}
        spread[what] = {**asdict(together), "interval": list(together.interval), **found}
    return spread
