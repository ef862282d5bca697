"""What a run of the benchmarks leaves: a table to read, and JSON that says where the figures come from."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from selective_ssm.bench.versions import commit, versions
from selective_ssm.files import write_json

RESULTS = Path("benchmarks/results")


def write_report(
    folder: Path,
    subject: str,
    device: torch.device,
    rows: Sequence[Mapping[str, Any]],
    gpu: Mapping[str, Any] | None = None,
) -> Path:
    """Write the figures of a subject as JSON, beside machine, versions, commit and time.

    Args:
        folder: the results' folder; the file goes to ``<folder>/<device>/<subject>.json``.
        subject: what was timed.
        device: where.
        rows: the figures.
        gpu: its driver and clocks.

    Returns:
        The file.
    """
    path = folder / re.sub(r"\W+", "-", device_name(device).lower()) / f"{subject}.json"
    data = {
        "subject": subject,
        "device": device_name(device),
        "machine": machine(),
        **({} if gpu is None else {"gpu": gpu}),
        "versions": versions(),
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "results": list(rows),
    }
    write_json(path, data)
    return path


def table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """Lay rows out as a table, a column a key; a key that a row does not have stays empty."""
    made = Table(title=title, title_justify="left")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        numbers = all(isinstance(row.get(name, 0), (int, float)) for row in rows)
        made.add_column(name, justify="right" if numbers else "left")
    for row in rows:
        made.add_row(*(_shown(row.get(name)) for name in names))
    return made


def machine() -> dict[str, Any]:
    """The processor, its cores, and the threads that torch uses."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    """What a device is called: the GPU's own name, else its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _processor() -> str:
    """The processor's name; Linux tells it in a file only."""
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", described)
    return found[1] if found else platform.machine()


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)
