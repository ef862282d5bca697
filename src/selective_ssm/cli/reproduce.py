"""``selective-ssm reproduce``: make the paper's tables again, run by run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from rich.console import Console

from selective_ssm.cli.device import add_device
from selective_ssm.cli.parser import Parser, config_from
from selective_ssm.errors import UserError, choice
from selective_ssm.models.device import usable_device
from selective_ssm.recipes import cell_path, cells

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selective_ssm.experiments.grid import Cell

_WIDE = 250  # characters, where a table goes to a file


def add_arguments(parser: Parser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("table", type=Literal["table1", "table2"], help="which of the paper's tables")
    parser.add_argument("--cell", type=str, action="append", help="only this cell; may be given several times")
    parser.add_argument("--budget", type=PositiveInt, help="steps of each run, in place of those of the recipes")
    parser.add_argument("--minutes", type=PositiveFloat, help="stop after so long; the same command goes on")
    parser.add_argument("--output", type=str, default="runs/reproduce", help="the folder of the runs")
    parser.add_argument(
        "--set", type=str, action="append", help="another setting of the cells, KEY=VALUE: batch_size=8"
    )
    parser.add_argument("--pack", type=str, help="write runs that are not done into this archive, and train nothing")
    parser.add_argument("--unpack", type=str, help="go on with the runs of this archive")
    parser.add_argument("--plot", type=bool, default=False, help="draw the cells that are done")
    add_device(parser)


def run(options: Namespace) -> None:
    """Do what is left of the runs, and print the table."""
    root = Path(options.output) / options.table
    device = usable_device(options.device)
    for name in options.cell or ():
        choice("cell", name, cells(options.table))
    from selective_ssm.experiments import archive, tables
    from selective_ssm.experiments.grid import write_summary

    chosen = {name: _cell(options, name, root) for name in options.cell or cells(options.table)}
    if options.unpack:
        print(f"{archive.unpack(Path(options.unpack), root)} runs taken from '{options.unpack}'")
    if options.pack:
        print(f"{archive.pack(chosen.values(), Path(options.pack), root)} runs written to '{options.pack}'")
        return
    _work(options, chosen, device)
    about = _about(device)
    for cell in chosen.values():
        if cell.results():
            write_summary(cell, about)
    table = tables.TABLES[options.table]
    console = Console()
    if not console.is_terminal:
        console.width = _WIDE
    console.print(tables.laid_out(table, chosen.values()))
    if any(not cell.wanted() for cell in chosen.values()):
        console.print(tables.counted(chosen.values()))
    if options.plot:
        tables.draw(table, chosen.values(), root.with_suffix(".svg"))
        print(f"drawn in '{root.with_suffix('.svg')}'")


def _cell(options: Namespace, name: str, root: Path) -> Cell:
    from selective_ssm.experiments.cell import KINDS, CellConfig
    from selective_ssm.experiments.grid import Cell

    parser = Parser(f"reproduce {options.table}", "a cell")
    parser.add_config(CellConfig)
    words = ["--config", str(cell_path(options.table, name)), *(f"--{setting}" for setting in options.set or ())]
    if options.budget:
        words.append(f"--steps={options.budget}")
    return Cell(name, config_from(parser.parse_words(words), CellConfig, KINDS), root / name)


def _work(options: Namespace, chosen: dict[str, Cell], device: torch.device) -> None:
    """Train here, or with a process for each GPU where ``cuda`` is asked for and there are several.

    Ctrl-C and SIGTERM end it after a step, when all that going on needs is written down.
    """
    from selective_ssm.experiments.grid import work_through
    from selective_ssm.training.signals import StopSignals

    count = torch.cuda.device_count() if str(options.device) == "cuda" else 1
    if count > 1:
        _work_on_all(count)
        return
    end = time.monotonic() + 60 * (options.minutes or float("inf"))
    with StopSignals() as signals:
        work_through(chosen, device, until=lambda: signals.received is not None or time.monotonic() > end, told=print)
    signals.leave()


def _work_on_all(count: int) -> None:
    """Run the same command on each GPU, in a process of its own."""
    from selective_ssm.training.signals import StopSignals

    command = [sys.executable, "-m", "selective_ssm", *sys.argv[1:], "--plot", "false", "--device"]
    processes: list[subprocess.Popen[bytes]] = []

    def end_all() -> None:
        for process in processes:
            process.terminate()

    with StopSignals(end_all) as signals:
        processes += [
            subprocess.Popen([*command, f"cuda:{index}"], stdout=subprocess.DEVNULL) for index in range(count)
        ]
        codes = [process.wait() for process in processes]
    signals.leave()
    if failed := [index for index, code in enumerate(codes) if code]:
        raise UserError(f"the processes of GPUs {', '.join(map(str, failed))} failed; what they said stands above")


def _about(device: torch.device) -> dict[str, Any]:
    """Where figures come from."""
    from selective_ssm.bench.report import device_name, machine
    from selective_ssm.bench.versions import commit, versions

    return {"device": device_name(device), "machine": machine(), "versions": versions(), "commit": commit()}
