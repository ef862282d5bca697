"""Thousands of drawn cases against float64: `python -m tests.ops.wide_grid --count 3000 --seconds 120`.

On a GPU, or with `--backend cpu` on a CPU.

Every operator, through its public function. All that is read or written lies between guards, memory is NaN until it is
written, and errors are measured against what tests/tolerance.py allows. What kernels are compiled for is drawn first,
so that few are; then sizes, strides, packs and values.

A case with an error beyond the tolerance of tests/tolerance.py is "above": such cases are counted and listed, but do
not end in exit 1 by themselves. The reference hands states over sixteen tokens at once and so rounds less often than
whatever goes token by token; where memories are long, a plain fp32 loop may thus be above too, and for each such case
it says how far. Only a case that is also beyond twice the error of that loop fails, and ends in exit 1; a step has no
loop to be compared with and fails where it is above.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from selective_ssm.ops import native, nvrtc
from selective_ssm.ops.selective_scan import operands, plan
from tests.ops.drawn import Kind, draw_kind, draw_trial
from tests.ops.guards import Guards
from tests.ops.trial import LANES, Trial
from tests.tolerance import allowed_error

FEW_TOKENS = 24
"""So many are run token by token; the float64 truth of more is the reference's."""
MOST_FAILURES = 50
OPERATORS = (
    ("selective_scan", 0.6),
    ("causal_conv1d", 0.2),
    ("selective_scan_step", 0.1),
    ("causal_conv1d_step", 0.1),
)  # fmt: skip


@dataclass
class Outcome:
    """What became of a case: of each result the error as a share of what is allowed."""

    trial: Trial
    ratios: dict[str, float]
    loop: dict[str, float]  # those of a plain loop over the tokens in fp32; only where a ratio is above 1

    def above(self, multiple: float = 0.0) -> dict[str, float]:
        """The ratios above 1, and above this multiple of the loop's."""
        return {name: x for name, x in self.ratios.items() if x > max(1.0, multiple * self.loop.get(name, 0.0))}

    def __str__(self) -> str:
        names = self.above()
        apart = ", ".join(f"{name} {x:.2f} (a loop: {self.loop.get(name, 0):.2f})" for name, x in names.items())
        return f"{apart or 'within what is allowed'}: {self.trial.words}"


@dataclass
class Report:
    """What has been seen so far."""

    worst: dict[str, tuple[float, int]] = field(default_factory=dict)  # of each result, with the case
    worst_above: dict[str, tuple[float, str]] = field(default_factory=dict)  # of each result that was ever above
    above: list[str] = field(default_factory=list)  # cases that are above what is allowed
    failures: list[str] = field(default_factory=list)  # those that a plain loop does not explain
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, case: int, outcome: Outcome) -> None:
        operator = outcome.trial.operator
        self.counts[operator] += 1
        for name, ratio in outcome.ratios.items():
            self.worst[f"{operator}.{name}"] = max((ratio, case), self.worst.get(f"{operator}.{name}", (-1.0, case)))
        for name, ratio in outcome.above().items():
            found = ratio, f"a loop: {outcome.loop.get(name, 0):.3f}, in case {case}"
            self.worst_above[f"{operator}.{name}"] = max(found, self.worst_above.get(f"{operator}.{name}", (0.0, "")))
        if outcome.above():
            self.above.append(f"above: case {case}: {outcome}")
        if outcome.above(2.0):
            self.failures.append(f"FAILED: case {case}: {outcome}")

    def __str__(self) -> str:
        lines = [f"{name:<32} worst ratio {ratio:6.3f} in case {case}" for name, (ratio, case) in self.worst.items()]
        counts = ", ".join(f"{count} x {name}" for name, count in self.counts.items())
        worst = [f"above: {name:<32} worst ratio {x:6.3f} ({words})" for name, (x, words) in self.worst_above.items()]
        total = f"{counts}: {len(self.above)} above the tolerance of tests/tolerance.py (listed, no failure), "
        total += f"{len(self.failures)} failed (and beyond twice a plain fp32 loop's error, or broken: exit 1)"
        return "\n".join([*sorted(lines), *self.above, *sorted(worst), *self.failures, total])


@dataclass(frozen=True)
class Grid:
    """The cases that a seed draws on a device."""

    seed: int = 0
    kinds: int = 40
    backend: str = "cuda"
    device: str = "cuda"
    longest: int = 300_000

    def kind(self, operator: str, number: int) -> Kind:
        kind = draw_kind(random.Random(f"{self.seed}/{operator}/{number}"), operator, number)
        if self.backend == "cpu" and kind.dtypes[0] == torch.float16:
            return replace(kind, dtypes=(torch.bfloat16, *kind.dtypes[1:]))  # a sequence in fp16 is not served
        return kind

    def all_kinds(self) -> list[Kind]:
        counts = [(operator, max(1, round(share * self.kinds))) for operator, share in OPERATORS]
        return [self.kind(operator, number) for operator, count in counts for number in range(count)]

    def trial(self, index: int, guards: Guards) -> Trial:
        chance = random.Random(f"{self.seed}/{index}")
        (operator,) = chance.choices([name for name, _ in OPERATORS], [share for _, share in OPERATORS])
        count = max(1, round(dict(OPERATORS)[operator] * self.kinds))
        kind = self.kind(operator, chance.randrange(count))
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + index)
        return draw_trial(kind, chance, generator, guards, self.longest)

    def outcome(self, index: int) -> Outcome:
        guards = Guards()
        trial = self.trial(index, guards)
        with plan.overridden(**trial.plan), guards.allocating():
            ours = trial.results(self.backend)
        with segments(16 if trial.tokens <= 2**12 else 128):
            reference = trial.results("reference")
            by_definition = trial.directions and trial.tokens <= FEW_TOKENS
            exact = trial.results(None if by_definition else "reference", torch.float64)
        found = Outcome(trial, judged(trial, ours, reference, exact), {})
        if not guards.intact():
            found.ratios["guards"] = math.inf
        if found.above() and trial.directions:
            with segments(max(1, trial.longest)):
                found.loop = judged(trial, trial.results("reference"), reference, exact)
        return found

    def compile_kernels(self) -> None:
        """Makes all kernels at once, on all cores."""

        def make(kind: Kind) -> None:
            chance, generator = random.Random(0), torch.Generator(self.device).manual_seed(0)
            trial = draw_trial(kind, chance, generator, Guards(), 3)
            with torch.autograd.set_multithreading_enabled(False):
                trial.results(self.backend)

        lock, nvrtc._lock = nvrtc._lock, contextlib.nullcontext()  # kernels are made one by one otherwise
        try:
            kinds = self.all_kinds()
            make(kinds[0])  # alone, since `cuda.core` cannot be imported by two threads at once
            with ThreadPoolExecutor(16) as threads:
                for lanes in LANES:  # a plan is overridden for all threads
                    with plan.overridden(lanes=lanes):
                        list(threads.map(make, [kind for kind in kinds if kind.lanes == lanes]))
        finally:
            nvrtc._lock = lock


@contextlib.contextmanager
def segments(steps: int) -> Iterator[None]:
    """The reference cuts sequences into segments of so many tokens; few and large steps are quicker on a GPU."""
    usual = operands.BLOCK_ELEMENTS, operands.STEPS
    operands.BLOCK_ELEMENTS, operands.STEPS = 2**23, steps
    try:
        yield
    finally:
        operands.BLOCK_ELEMENTS, operands.STEPS = usual


def judged(
    trial: Trial, ours: dict[str, Tensor], reference: dict[str, Tensor], exact: dict[str, Tensor]
) -> dict[str, float]:
    """Of each result the error as a share of what tests/tolerance.py allows; waits for the device once."""
    names = [name for name, x in exact.items() if x.numel() > 0]
    for name, x in ours.items():
        assert x.dtype == reference[name].dtype, f"{name} is {x.dtype}, expected {reference[name].dtype}"
        assert x.shape == exact[name].shape, f"{name} has shape {x.shape}, expected {exact[name].shape}"
    if not names:
        return {}
    sizes = [
        torch.stack([y.abs().max() for y in (truth, ours[name] - truth, reference[name] - truth)])
        for name, truth in ((name, exact[name]) for name in names)
    ]
    found = {}
    for name, (largest, error, plain) in zip(names, torch.stack(sizes).tolist(), strict=True):
        allowed = allowed_error(ours[name].dtype, plain, largest, summed=trial.terms.get(name, 0))
        found[name] = 0.0 if error == 0 else error / allowed if math.isfinite(error) and allowed > 0 else math.inf
    return found


def run(grid: Grid, count: int, seconds: float) -> Report:
    """Runs cases one after the other until there were so many, or the time is over."""
    report, start = Report(), time.monotonic()
    for index in range(count):
        if time.monotonic() - start > seconds:
            break
        try:
            report.add(index, grid.outcome(index))
        except Exception as error:
            report.failures.append(f"FAILED: case {index}: {type(error).__name__}: {error}")
            if len(report.failures) > MOST_FAILURES:
                break
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=3000, help="cases at most")
    parser.add_argument("--seconds", type=float, default=120, help="time at most, compilation not counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=int, default=40, help="configurations that kernels are compiled for")
    parser.add_argument("--longest", type=int, default=300_000, help="tokens of a case at most")
    parser.add_argument("--backend", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", type=int, help="runs this case alone and prints all its ratios")
    given = parser.parse_args()
    if (reason := (native if given.backend == "cpu" else nvrtc).explain()) is not None:
        parser.error(f"no kernel can run here: {reason}")
    grid = Grid(given.seed, given.kinds, given.backend, given.backend, longest=given.longest)
    if given.only is not None:
        outcome = grid.outcome(given.only)
        print(outcome, *(f"{name:<16} {ratio:.3f}" for name, ratio in outcome.ratios.items()), sep="\n")
        return int(bool(outcome.above(2.0)))
    if given.backend == "cuda":
        start = time.monotonic()
        grid.compile_kernels()
        print(f"compiled for {len(grid.all_kinds())} configurations in {time.monotonic() - start:.1f} s", flush=True)
    report = run(grid, given.count, given.seconds)
    print(report)
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())
