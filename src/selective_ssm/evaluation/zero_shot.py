"""Tasks of the evaluation harness, from the hub or from local files, and what a model reaches in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from selective_ssm.data.tokenizers import Tokenizer
from selective_ssm.errors import UserError, nearest, require
from selective_ssm.evaluation.harness import harness_model
from selective_ssm.evaluation.local_tasks import PREFIX, local_task
from selective_ssm.evaluation.published import published
from selective_ssm.models import LanguageModel

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks.manager import TaskDict

_FEWSHOT_SEED = 1234  # the harness's own


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a model reached in a task, by one of its metrics.

    Args:
        task: the harness's name of the task; "local_" before it where the rows came from a local file.
        metric: the harness's name of the metric.
        value: the figure; accuracies are fractions.
        stderr: its standard error; None where the harness's definition of the metric allows none.
        rows: how many rows were evaluated.
        rows_in_set: how many there are.
        published: what the paper's released model of this size reached, never of a local task.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    rows: int
    rows_in_set: int
    published: float | None


def evaluate_tasks(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    overlap: int | None = None,
) -> list[TaskResult]:
    """Evaluate a model in tasks of the harness, as they are defined there.

    Args:
        model: the language model, on any device.
        tokenizer: the one the model was trained with.
        tasks: the harness's names.
        data_dir: a folder with local files of the sets, see `local_task`; None asks the Hugging Face hub.
        limit: only so many rows of each task, the first ones.
        max_length: as in `harness_model`.
        overlap: as in `harness_model`.

    Returns:
        A result for each metric of each task.

    Raises:
        MissingPackage: ``lm_eval`` is not installed.
        UserError: there is no such task, its data cannot be had, or `limit` or the settings are out of their range.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be 1 or more, got {limit}")
    evaluator = require("lm_eval.evaluator", extra="evaluation")
    answers = harness_model(model, tokenizer, max_length=max_length, overlap=overlap)
    loaded = _from_hub(tasks) if data_dir is None else _from_files(tasks, data_dir)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(_FEWSHOT_SEED)
    # The harness would find standard errors of perplexities by resampling, in processes of its own.
    found = evaluator.evaluate(answers, loaded, limit=limit, bootstrap_iters=0)
    paper = published(model.config) if data_dir is None else {}
    return [result for name in found["n-samples"] for result in _results(found, name, loaded["tasks"][name], paper)]


def _from_files(tasks: Sequence[str], data_dir: str | Path) -> TaskDict:
    made = [local_task(name.removeprefix(PREFIX), data_dir) for name in tasks]
    return {"tasks": {task.task_name: task for task in made}}


def _from_hub(tasks: Sequence[str]) -> TaskDict:
    manager = require("lm_eval.tasks", extra="evaluation").TaskManager()
    for name in tasks:
        if name not in manager.all_tasks:  # the harness would take a path too, of a file that may name code to run
            raise UserError(f"lm_eval has no task '{name}'{nearest(name, manager.all_tasks)}")
    try:
        loaded: TaskDict = manager.load(list(tasks))
    except OSError as error:
        raise UserError(
            f"the data of {', '.join(tasks)} cannot be had from the Hugging Face hub: connect to it, or name a folder "
            f"with local files by data_dir ({error})"
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"the task '{name}' runs code that a model has written, and that is not done here")
    return loaded


def _results(
    found: Mapping[str, Any], name: str, task: Task, paper: Mapping[tuple[str, str], float]
) -> Iterator[TaskResult]:
    """The results of a task, out of what the harness returns."""
    count = found["n-samples"][name]
    aggregations = cast("Mapping[str, object]", task.aggregation())
    for key, value in found["results"][name].items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr"):
            continue
        values = [row[metric] for row in found["samples"][name] if row["filter"] == chosen and metric in row]
        yield TaskResult(
            task=name,
            metric=metric,
            value=float(value),
            stderr=_standard_error(aggregations.get(metric), values),
            rows=count["effective"],
            rows_in_set=count["original"],
            published=paper.get((name, metric)),
        )


def _standard_error(aggregation: object, values: Sequence[Any]) -> float | None:
    """Of a mean, √(Σ(x − x̄)² / (n − 1) / n); of exp(−mean), that times exp(−mean), to first order."""
    known = require("lm_eval.api.metrics", extra="evaluation")
    if aggregation not in (known.mean, known.perplexity) or len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    of_mean = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    return of_mean if aggregation is known.mean else of_mean * math.exp(-mean)
