"""``selective-ssm bench``: time the scan, the convolution, the step or whole models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import rich
from jsonargparse.typing import PositiveInt

from selective_ssm.bench.report import RESULTS, device_name, table, write_report
from selective_ssm.bench.run import SUBJECTS
from selective_ssm.cli.device import add_device
from selective_ssm.errors import choice
from selective_ssm.models.device import usable_device

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selective_ssm.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("subject", type=Literal["scan", "conv", "step", "model"], help="what to time")
    parser.add_argument("--case", type=str, action="append", help="only this case; may be given several times")
    parser.add_argument(
        "--rounds", type=PositiveInt, default=5, help="how often each case is timed; the median is told"
    )
    parser.add_argument("--output", type=str, default=str(RESULTS), help="the folder of the results")
    add_device(parser)


def run(options: Namespace) -> None:
    """Time the cases, print a table and write it as JSON."""
    cases, timed = SUBJECTS[options.subject]
    known = {case.name: case for case in cases}
    for name in options.case or ():
        choice("case", name, known)
    device = usable_device(options.device)
    chosen = [known[name] for name in options.case or known]
    rows = [row for case in chosen for row in timed(case, device, options.rounds)]
    rich.print(table(rows, title=f"{options.subject} on {device_name(device)}"))
    print(f"written to {write_report(Path(options.output), options.subject, device, rows)}")
