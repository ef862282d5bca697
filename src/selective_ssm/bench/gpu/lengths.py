"""The scan, attention and a scan in plain torch over the length: Figure 8, left, of the paper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from selective_ssm import plots
from selective_ssm.bench import cases
from selective_ssm.bench.cases import OpCase, Setup
from selective_ssm.bench.contenders import Contender, passes
from selective_ssm.bench.gpu import peers
from selective_ssm.bench.gpu.attention import attend, fastest, limited
from selective_ssm.bench.gpu.cases import LengthCase
from selective_ssm.bench.gpu.operators import timed
from selective_ssm.bench.loop import scan_by_doubling
from selective_ssm.bench.run import Row, leaves
from selective_ssm.ops import selective_scan

_COPIES = 5  # of every state, that the scan in plain torch holds at once
_BOTH = ("forward", "forward+backward")


def lengths(case: LengthCase, setup: Setup) -> Iterator[Row]:
    """Each of the three at one length, in bf16; the scan in plain torch only forward, and where memory suffices."""
    scan = OpCase(batch=case.batch, length=case.length, channels=2 * case.d_model, states=16, dtype=torch.bfloat16)
    inputs = leaves(cases.scan_inputs(scan, setup.device))
    ours = partial(selective_scan, **inputs, delta_softplus=True)
    contenders: list[tuple[Contender, tuple[str, ...]]] = [(Contender("scan", ours, list(inputs.values())), _BOTH)]
    if _free_bytes(setup.device) > _COPIES * scan.elements * scan.states * 4:
        contenders.append((Contender("scan in plain torch", partial(scan_by_doubling, **inputs), []), ("forward",)))
    if "mamba_ssm" in setup.peers:
        contenders.append((peers.mamba_scan(inputs, scan), _BOTH))
    if "sdpa" in setup.peers:
        contenders.append((_attention(case, setup), _BOTH))
    for one, names in contenders:
        for name, call in passes(one, *names):
            row: Row = {"case": case.name, "length": case.length, "batch": case.batch, "pass": name, "who": one.who}
            best = fastest(call, setup) if one.who == "attention" and call is not None else None
            yield row | timed(call and limited(call, best), setup, one.note) | ({"by": best} if best else {})


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot time over length, a line for each contender and pass.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    figure, (axes,) = plots.panels()
    colours: dict[str, str] = {}
    for who, name in dict.fromkeys((row["who"], row["pass"]) for row in rows if "gpu µs" in row):
        chosen = [row for row in rows if (row["who"], row["pass"]) == (who, name) and "gpu µs" in row]
        x, y = [row["length"] for row in chosen], [row["gpu µs"] / 1e3 for row in chosen]
        style = "-" if name == "forward" else "--"
        colour = colours.setdefault(who, f"C{len(colours)}")
        axes.plot(x, y, style, color=colour, marker=".", label=f"{who}, {name}")
    plots.dress(axes, "length (tokens)", "ms")
    plots.save(figure, path)


def _attention(case: LengthCase, setup: Setup) -> Contender:
    random = torch.Generator(setup.device).manual_seed(0)
    shape = (case.batch, case.d_model // case.head_dim, case.length, case.head_dim)
    q, k, v = (
        torch.randn(shape, generator=random, device=setup.device, dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    return Contender("attention", partial(attend, q, k, v), [q, k, v])


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 2**30
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
