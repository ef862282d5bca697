"""The paper's tables that are made again: what their cells are called, and how they are laid out and drawn.

A cell's recipe is ``recipes/<table>/<cell>.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from selective_ssm import plots
from selective_ssm.experiments.grid import Cell
from selective_ssm.tasks import Share


@dataclass(frozen=True, kw_only=True)
class Table:
    """One of the paper's tables.

    Args:
        title: what it shows.
        lengths: whether it is about other lengths than that which is learned.
    """

    title: str
    lengths: bool


TABLES = {
    "table1": Table(title="Selective copying (Table 1): right answers in percent", lengths=False),
    "table2": Table(title="Induction heads (Table 2): right answers in percent, by length", lengths=True),
}


def laid_out(table: Table, cells: Iterable[Cell]) -> RichTable:
    """The cells beside the paper's figures; those that were not run are told as such."""
    summaries = [(cell, cell.summary()) for cell in cells]
    lengths = sorted({int(length) for _, one in summaries for length in one.get("tests", {})}) if table.lengths else []
    made = RichTable(title=table.title, title_justify="left")
    for name in ("cell", "paper", *map(str, lengths or ["ours", "whole rows"]), "rate", "steps", "minutes", "state"):
        made.add_column(name, justify="left" if name in ("cell", "state") else "right")
    for cell, summary in summaries:
        tests = summary.get("tests", {})
        if lengths:
            shown = [_percent(tests.get(str(length), {}).get("tokens")) for length in lengths]
        else:
            own = tests.get(str(cell.config.task.length), {})
            shown = [_percent(own.get("tokens")), _percent(own.get("sequences"))]
        rate, paper = summary.get("learning rate"), cell.config.paper
        minutes = sum(run["seconds"] for run in summary["runs"]) / 60
        made.add_row(
            cell.name,
            "" if paper is None else f"{paper:g}",
            *shown,
            "" if rate is None else f"{rate:g}",
            f"{cell.config.steps:,}",
            f"{minutes:.1f}" if summary["runs"] else "",
            _state(cell, summary),
        )
    return made


def counted(cells: Iterable[Cell]) -> RichTable:
    """How many answers were right at each length, over all seeds, and the 95 % interval of their share."""
    made = RichTable()
    for name in ("cell", "length", "right", "of", "95 % interval"):
        made.add_column(name, justify="left" if name == "cell" else "right")
    for cell in cells:
        for length, test in cell.summary().get("tests", {}).items():
            share = test["tokens"]
            low, high = (100 * bound for bound in share["interval"])
            made.add_row(cell.name, length, str(share["right"]), str(share["all"]), f"{low:.2f} to {high:.2f} %")
    return made


def draw(table: Table, cells: Iterable[Cell], path: Path) -> None:
    """Draw right answers over the length, or over the steps of training, a line a seed, of the cells that are done."""
    figure, (axes,) = plots.panels()
    done = [summary for cell in cells if "tests" in (summary := cell.summary())]
    for index, summary in enumerate(done):
        judged = [run for run in summary["runs"] if run["learning_rate"] == summary["learning rate"]]
        for run in judged:
            points = _over_length(run) if table.lengths else _over_steps(run)
            x, y = [at for at, _ in points], [100 * share for _, share in points]
            label = None if run["seed"] else summary["cell"]  # once in the legend
            axes.plot(x, y, color=f"C{index}", marker="." if table.lengths else "", linewidth=1, label=label)
    axes.set(xlabel="length" if table.lengths else "steps", ylabel="right answers, %", ylim=(0, 101))
    if table.lengths:
        axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    if done:
        figure.legend(loc="outside right upper", fontsize="small")
    plots.save(figure, path)


def _over_length(run: Mapping[str, Any]) -> list[tuple[int, float]]:
    return [(int(length), Share(**test["tokens"]).value) for length, test in run["tests"].items()]


def _over_steps(run: Mapping[str, Any]) -> list[tuple[int, float]]:
    return [(look["step"], look["tokens"]) for look in run["looks"]]


def _percent(spread: Mapping[str, float] | None) -> str:
    """The mean, and from where to where seeds go."""
    if spread is None:
        return ""
    mean, least, most = (100 * spread[name] for name in ("mean", "least", "most"))
    return f"{mean:.1f}" if f"{least:.1f}" == f"{most:.1f}" else f"{mean:.1f} ({least:.1f} to {most:.1f})"


def _state(cell: Cell, summary: Mapping[str, Any]) -> str:
    if "tests" in summary:
        return "done"
    done, steps = len(summary["runs"]), cell.steps()
    return f"{done} runs done, {steps:,} steps of others" if done or steps else "not run"
