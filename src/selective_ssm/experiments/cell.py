"""A cell of a table: one model on one synthetic task, and the runs by which it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from selective_ssm.config import Config
from selective_ssm.errors import UserError, choice
from selective_ssm.models import CONFIG_KINDS, LanguageModelConfig
from selective_ssm.tasks import TASKS, SyntheticTask
from selective_ssm.training import OptimizerConfig, ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class CellConfig(Config):
    """A model, a task, and how the one learns the other.

    Args:
        model: the language model.
        task: what it learns.
        steps: optimizer steps of each run.
        batch_size: rows of a step.
        optimizer: AdamW's settings; each run puts its own learning rate in.
        schedule: how the learning rate moves.
        precision: of branches and head on a GPU; parameters, moments and the residual stream stay in fp32.
        learning_rates: those that are tried.
        seeds: runs at the best of them.
        test_rows: rows of each test.
        test_lengths: lengths at which the task is tested beside the one that it is learned at.
        far_length: one that is tested with fewer rows, as it is so long; None is none.
        far_rows: how many.
        paper: what the paper reports, in percent of the answers.
    """

    kind: ClassVar[str] = "cell"

    model: LanguageModelConfig
    task: SyntheticTask
    steps: int = 25_000
    batch_size: int = 64
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: Literal["fp32", "bf16"] = "bf16"
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    seeds: int = 3
    test_rows: int = 1024
    test_lengths: tuple[int, ...] = ()
    far_length: int | None = None
    far_rows: int = 64
    paper: float | None = None

    def __post_init__(self) -> None:
        choice("precision", self.precision, ("fp32", "bf16"))
        for name in ("steps", "batch_size", "seeds", "test_rows", "far_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"cell: {name} must be 1 or more, got {getattr(self, name)}")
        if not self.learning_rates:
            raise UserError("cell: learning_rates must hold at least one")
        if self.model.vocab_size < self.task.vocab_size:
            needed, found = self.task.vocab_size, self.model.vocab_size
            raise UserError(f"cell: model.vocab_size must be {needed} or more, as many as the task has, got {found}")

    @property
    def tests(self) -> dict[int, int]:
        """How many rows are tested at each length."""
        tests = dict.fromkeys(sorted({self.task.length, *self.test_lengths}), self.test_rows)
        return tests if self.far_length is None else tests | {self.far_length: self.far_rows}


KINDS: Mapping[str, type[Config]] = {
    **CONFIG_KINDS,
    **TASKS,
    **{one.kind: one for one in (CellConfig, OptimizerConfig, ScheduleConfig)},
}
"""Every config that a tagged `CellConfig` may hold."""


class Run(NamedTuple):
    """One training of a cell's model.

    Attributes:
        learning_rate: its peak.
        seed: of the initial values and of the rows it learns from.
    """

    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"lr-{self.learning_rate:g}-seed-{self.seed}"


def wanted(cell: CellConfig, scores: Mapping[Run, float]) -> list[Run]:
    """The runs of a cell that can be done now: each learning rate with one seed, then the best one with the others.

    Args:
        cell: the cell.
        scores: the share of right answers of each run that is done, over all lengths.

    Returns:
        What is not done of the first stage, or, where that is done, of the second; nothing where all is done.

    Example:
        >>> from selective_ssm.tasks import InductionHeads
        >>> model = LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16)
        >>> cell = CellConfig(model=model, task=InductionHeads(), learning_rates=(0.1, 0.2), seeds=2)
        >>> [run.name for run in wanted(cell, {Run(0.1, 0): 0.5})]
        ['lr-0.2-seed-0']
        >>> [run.name for run in wanted(cell, {Run(0.1, 0): 0.5, Run(0.2, 0): 0.4})]
        ['lr-0.1-seed-1']
    """
    first = [Run(rate, 0) for rate in cell.learning_rates]
    if missing := [run for run in first if run not in scores]:
        return missing
    return [run for run in judged_by(cell, scores) if run not in scores]


def judged_by(cell: CellConfig, scores: Mapping[Run, float]) -> list[Run]:
    """The runs that speak for a cell: all seeds of the learning rate that did best with the first seed.

    Of rates that did equally well it is the one in the middle: there its neighbours did well, too.
    """
    first = [Run(rate, 0) for rate in sorted(cell.learning_rates)]
    top = max(scores[run] for run in first)
    best = [run for run in first if scores[run] == top]
    rate = best[len(best) // 2].learning_rate
    return [Run(rate, seed) for seed in range(cell.seeds)]
