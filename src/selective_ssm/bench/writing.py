"""Reading prompts and writing on, over the batch and over the length: Figure 8, right, of the paper, and its memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from selective_ssm import plots
from selective_ssm.bench import writers
from selective_ssm.bench.cases import Setup, WritingCase
from selective_ssm.bench.clock import seconds
from selective_ssm.bench.contenders import Call, Contender
from selective_ssm.bench.memory import forget_peak, peak
from selective_ssm.bench.run import Row
from selective_ssm.bench.writers import Writer
from selective_ssm.models import preset

_MOSTLY_READING = 0.5  # of the whole time; what is left of it is too small a difference for a figure


def writing(case: WritingCase, setup: Setup) -> Iterator[Row]:
    """Each contender at each shape: tokens a second, time to the first one, and the most memory in use.

    "tokens a second" has the reading in it; "decoding" is the other tokens of each text over the time after the first,
    where that is a good part of the whole. The figures are medians; on a CPU the least times, to which others only add.
    Whoever runs out of memory or takes too long is not asked for larger shapes; the rows say so.
    """
    config = preset(case.preset)
    for one in writers.contenders(case, config, setup):
        yield from _shapes(case, one, config.vocab_size, setup)
        forget_peak(setup.device)


def _shapes(case: WritingCase, one: Contender, vocabulary: int, setup: Setup) -> Iterator[Row]:
    if one.call is None:
        yield {"case": case.name, "who": one.who, "note": one.note}
        return
    writer: Writer = one.call()
    left_out = ""
    for batch, length in case.shapes:
        row: Row = {"case": case.name, "who": one.who, "batch": batch, "length": length}
        prompts = torch.randint(vocabulary, (batch, length), device=setup.device)
        times = left_out or _attempt(writer, prompts, case, setup)
        if isinstance(times, str):
            left_out = times
            yield row | {"note": left_out}
            continue
        first, whole = times
        row |= {"tokens a second": batch * case.new_tokens / whole, "first token ms": first * 1e3}
        if first < _MOSTLY_READING * whole:
            row["decoding"] = batch * (case.new_tokens - 1) / (whole - first)
        yield row | peak(setup.device) | {"parameters": writer.parameters}
        if whole > case.patience:
            left_out = f"left out: a smaller one took {whole:.0f} s"


def _attempt(writer: Writer, prompts: Tensor, case: WritingCase, setup: Setup) -> tuple[float, float] | str:
    """Seconds to the first token of every text, and to the last; or why there are none."""
    if writer.most_tokens is not None and prompts.numel() > writer.most_tokens:
        return "left out: reads token by token"
    try:
        writer.take(prompts, case.new_tokens)
        writer.write(1)  # kernels for a prompt of this shape are made now
        forget_peak(setup.device)
        first, whole = (_timed(partial(writer.write, count), case, setup) for count in (1, case.new_tokens))
        return first, whole
    except RuntimeError as error:  # memory, or a limit of somebody's kernels: it must not take other figures along
        return str(error).partition("\n")[0].partition(". ")[0]


def _timed(call: Call, case: WritingCase, setup: Setup) -> float:
    taken = [seconds(call, setup.device)]
    while len(taken) < setup.rounds and sum(taken) < case.seconds:
        taken.append(seconds(call, setup.device))
    return min(taken) if setup.device.type == "cpu" else statistics.median(taken)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot tokens a second over the batch, and memory over the length, a line for each model of each contender.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    figure, (speed, memory) = plots.panels(2)
    for axes, over, unit, label in (
        (speed, "batch", "tokens a second", "generated tokens a second"),
        (memory, "length", "GiB", "peak memory (GiB)"),
    ):
        colours: dict[str, str] = {}
        styles: dict[str, str] = {}
        drawn = [row for row in rows if unit in row and str(row["case"]).endswith(f"-{over}")]
        for case, who in dict.fromkeys((row["case"], row["who"]) for row in drawn):
            own = [row for row in drawn if (row["case"], row["who"]) == (case, who)]
            colour = colours.setdefault(who, f"C{len(colours)}")
            style = styles.setdefault(case, ("-", "--", ":")[len(styles) % 3])
            x, y = [row[over] for row in own], [row[unit] for row in own]
            axes.plot(x, y, style, color=colour, marker=".", label=f"{case.removesuffix(f'-{over}')}: {who}")
        plots.dress(axes, over if over == "batch" else "length of the prompt (tokens)", label)
    plots.save(figure, path)
