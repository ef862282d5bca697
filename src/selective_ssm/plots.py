"""Figures of matplotlib, all of one kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selective_ssm.errors import require


def panels(count: int = 1) -> tuple[Any, list[Any]]:
    """A figure, and its axes beside each other.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    require("matplotlib", "plots").rcParams["svg.fonttype"] = "none"
    figure = require("matplotlib.figure", "plots").Figure(figsize=(7 * count, 4.5), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def dress(axes: Any, x: str, y: str) -> None:
    """Label axes of powers, by two along x, and say which line is whose."""
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def save(figure: Any, path: Path) -> None:
    """Write a figure, without the time, so that the same figures give the same file."""
    figure.savefig(path, metadata={"Date": None})
