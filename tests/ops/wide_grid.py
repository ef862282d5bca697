"""Thousands of drawn cases on a GPU against float64: `python -m tests.ops.wide_grid --count 3000 --seconds 120`.

Every operator, through its public function. All that is read or written lies between guards, memory is NaN until it is
written, and results are judged as in tests/tolerance.py: a case passes where no error is above what is allowed. What
kernels are compiled for is drawn first, so that few are; then sizes, strides, packs and values.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from selective_ssm.ops import nvrtc
from selective_ssm.ops.selective_scan import operands, plan
from tests.ops.drawn import Kind, Trial, draw_kind, draw_trial
from tests.ops.guards import Guards

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
class Report:
    """What has been seen so far."""

    worst: dict[str, tuple[float, str]] = field(default_factory=dict)  # of each result, with the case
    failures: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, case: str, trial: Trial, ratios: dict[str, float]) -> None:
        self.counts[trial.operator] += 1
        for name, ratio in ratios.items():
            name = f"{trial.operator}.{name}"
            if ratio >= self.worst.get(name, (-1.0, ""))[0]:
                self.worst[name] = (ratio, case)
        if bad := {name: round(ratio, 2) for name, ratio in ratios.items() if ratio > 1}:
            self.failures.append(f"case {case}: {bad}\n    {trial.words}")

    def __str__(self) -> str:
        lines = [f"{name:<40} worst ratio {ratio:6.3f} in case {case}" for name, (ratio, case) in self.worst.items()]
        counts = ", ".join(f"{count} x {name}" for name, count in self.counts.items())
        return "\n".join([*sorted(lines), *self.failures, f"{counts}: {len(self.failures)} failed"])


@dataclass(frozen=True)
class Grid:
    """The cases that a seed draws on a device."""

    seed: int = 0
    kinds: int = 40
    backend: str = "cuda"
    device: str = "cuda"
    longest: int = 300_000

    def kind(self, operator: str, number: int) -> Kind:
        return draw_kind(random.Random(f"{self.seed}/{operator}/{number}"), operator, number)

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

    def ratios(self, index: int) -> tuple[Trial, dict[str, float]]:
        """A case and, for each of its results, the error as a share of what is allowed."""
        guards = Guards()
        trial = self.trial(index, guards)
        with plan.overridden(**trial.plan), guards.allocating():
            ours = trial.results(self.backend)
        with long_segments(trial.tokens):
            reference = trial.results("reference")
            by_definition = trial.directions and trial.tokens <= FEW_TOKENS
            exact = trial.results(None if by_definition else "reference", torch.float64)
        found = judged(trial, ours, reference, exact)
        if not guards.intact():
            found["guards"] = math.inf
        return trial, found

    def compile_kernels(self) -> None:
        """Makes all kernels at once, on all cores."""

        def make(kind: Kind) -> None:
            chance, generator = random.Random(0), torch.Generator(self.device).manual_seed(0)
            trial = draw_trial(kind, chance, generator, Guards(), 3)
            with torch.autograd.set_multithreading_enabled(False):
                trial.results(self.backend)

        lock, nvrtc._lock = nvrtc._lock, contextlib.nullcontext()  # kernels are made one by one otherwise
        try:
            with ThreadPoolExecutor(16) as threads:
                for lanes in (1, 2, 4, 8):  # a plan is overridden for all threads
                    with plan.overridden(lanes=lanes):
                        list(threads.map(make, [kind for kind in self.all_kinds() if kind.lanes == lanes]))
        finally:
            nvrtc._lock = lock


@contextlib.contextmanager
def long_segments(tokens: int) -> Iterator[None]:
    """The reference takes few and large steps, which a GPU is quicker at."""
    usual = operands.BLOCK_ELEMENTS, operands.STEPS
    operands.BLOCK_ELEMENTS, operands.STEPS = 2**23, 16 if tokens <= 2**12 else 128
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
        allowed = 2 * plain + 8 * torch.finfo(ours[name].dtype).eps / 2 * largest
        allowed += math.sqrt(trial.terms.get(name, 0)) * torch.finfo(torch.float32).eps / 2 * largest
        found[name] = 0.0 if error == 0 else error / allowed if math.isfinite(error) and allowed > 0 else math.inf
    return found


def run(grid: Grid, count: int, seconds: float) -> Report:
    """Runs cases one after the other until there were so many, or the time is over."""
    report, start = Report(), time.monotonic()
    for index in range(count):
        if time.monotonic() - start > seconds:
            break
        try:
            report.add(str(index), *grid.ratios(index))
        except Exception as error:
            report.failures.append(f"case {index}: {type(error).__name__}: {error}")
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
    parser.add_argument("--only", type=int, help="runs this case alone and prints all its ratios")
    given = parser.parse_args()
    grid = Grid(given.seed, given.kinds, longest=given.longest)
    if given.only is not None:
        trial, ratios = grid.ratios(given.only)
        print(trial.words, *(f"{name:<16} {ratio:.3f}" for name, ratio in ratios.items()), sep="\n")
        return int(max(ratios.values(), default=0.0) > 1)
    start = time.monotonic()
    grid.compile_kernels()
    print(f"compiled for {len(grid.all_kinds())} configurations in {time.monotonic() - start:.1f} s", flush=True)
    report = run(grid, given.count, given.seconds)
    print(report)
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())
