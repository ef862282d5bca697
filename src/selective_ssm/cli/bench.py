"""``selective-ssm bench``: time operators, blocks and whole models, beside floors and peers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import rich
from jsonargparse.typing import PositiveInt

from selective_ssm.bench.cases import Setup
from selective_ssm.bench.gpu.device import state
from selective_ssm.bench.report import RESULTS, device_name, table, write_report
from selective_ssm.bench.run import Row
from selective_ssm.bench.subjects import DRAWN, PEERS, subject
from selective_ssm.cli.device import add_device
from selective_ssm.errors import UserError, choice
from selective_ssm.models.device import usable_device
from selective_ssm.ops.selective_scan.plan import LANES, overridden

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selective_ssm.cli.parser import Parser


Subject = Literal[
    "scan",
    "conv",
    "norm",
    "step",
    "host",
    "first-call",
    "blocks",
    "neighbours",
    "lengths",
    "model",
    "decode",
    "generate",
    "transformers",
]


def add_arguments(parser: Parser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "subject",
        type=Subject,
        help="what to time; all but scan, conv, step, model, decode, generate, transformers on a GPU only",
    )
    parser.add_argument("--case", type=str, action="append", help="only this case; may be given several times")
    parser.add_argument(
        "--rounds", type=PositiveInt, default=5, help="how often each case is timed; the median is told"
    )
    parser.add_argument("--peer", type=str, help=f"what to time beside ours: {_peers()}")
    parser.add_argument(
        "--plan", type=str, help="how scans are laid out on a GPU instead of as chosen: lanes=4,pieces=2"
    )
    parser.add_argument("--plot", type=bool, default=False, help="draw lengths, or generate, beside their figures")
    parser.add_argument("--output", type=str, default=str(RESULTS), help="the folder of the results")
    add_device(parser)


def run(options: Namespace) -> None:
    """Time the cases, print a table and write it as JSON; what an interruption leaves goes to a file of its own."""
    device = usable_device(options.device)
    cases, timed = subject(options.subject, device)
    known = {case.name: case for case in cases}
    for name in options.case or ():
        choice("case", name, known)
    peers = tuple(options.peer.split(",")) if options.peer else ()
    for name in peers:
        choice("peer", name, PEERS.get(device.type, ()))
    if options.plot and options.subject not in DRAWN:
        raise UserError(f"only {', '.join(map(repr, DRAWN))} can be drawn, not '{options.subject}'")
    setup = Setup(device=device, rounds=options.rounds, peers=peers)
    before = state(device)
    plan = {"plan": options.plan} if options.plan else {}
    rows: list[Row] = []

    def tell(name: str) -> Path:
        gpu = {"before": before, "after": state(device)} if before else None
        rich.print(table(rows, title=f"{name} on {device_name(device)}"))
        path = write_report(Path(options.output), name, device, rows, gpu)
        print(f"written to {path}")
        return path

    try:
        with overridden(**_plan(options.plan)):
            for name in options.case or known:
                rows.extend(row | plan for row in timed(known[name], setup))
    except BaseException:
        if rows:
            tell(f"{options.subject}-cut")
        raise
    path = tell(options.subject)
    if options.plot:
        DRAWN[options.subject](rows, path.with_suffix(".svg"))
        print(f"drawn in {path.with_suffix('.svg')}")


def _peers() -> str:
    """Each device's, for the help."""
    return "; ".join(f"{','.join(names)} on {device}" for device, names in PEERS.items())


def _plan(words: str | None) -> dict[str, int]:
    """The fields of a plan that `--plan` names."""
    fields: dict[str, int] = {}
    for word in words.split(",") if words else ():
        name, _, number = word.partition("=")
        choice("field of a plan", name, ("lanes", "pieces"))
        if not number.isdecimal() or int(number) not in (LANES if name == "lanes" else range(1, 2**20)):
            known = f"one of {', '.join(map(str, LANES))}" if name == "lanes" else "a positive number"
            raise UserError(f"--plan has '{word}'; expected for {name} {known}")
        fields[name] = int(number)
    return fields
