"""From names of tasks to figures: where the rows come from, how many they are, and what stands beside."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
import pytest
from datasets import Dataset
from lm_eval.api import metrics
from lm_eval.api import task as harness_task
from lm_eval.api.metrics import mean_stderr
from lm_eval.tasks import TaskManager

from selective_ssm.data import ByteTokenizer
from selective_ssm.errors import UserError
from selective_ssm.evaluation import TaskResult, evaluate_tasks, zero_shot
from selective_ssm.evaluation.local_tasks import LOCAL_SETS
from selective_ssm.models import LanguageModel, LanguageModelConfig
from tests.evaluation.rows import ROWS, WIKITEXT

BYTES = ByteTokenizer()


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(LanguageModelConfig(d_model=16, n_layer=1, vocab_size=257)).eval()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness that knows few tasks, as it looks through thousands of files for all of them, and a hub of one set."""
    few = [Path(lm_eval.__file__).parent / "tasks" / folder for folder in ("piqa", "hellaswag")]
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False, include_path=few))

    def load_dataset(*, path: str, name: str | None) -> dict[str, Dataset]:
        if path != "baber/piqa":
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub (LocalEntryNotFoundError)")
        rows = Dataset.from_list(ROWS["piqa_valid.jsonl.gz"])
        return {"train": rows, "validation": rows}

    monkeypatch.setattr(harness_task.datasets, "load_dataset", load_dataset)


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the model were of a released size."""
    figures = {(name, metric): 0.5 for name in LOCAL_SETS for metric in ("acc", "acc_norm")}
    figures |= {(f"local_{name}", metric): value for (name, metric), value in figures.items()}
    monkeypatch.setattr(zero_shot, "published", lambda config: figures)


def by_name(results: list[TaskResult]) -> dict[tuple[str, str], TaskResult]:
    return {(result.task, result.metric): result for result in results}


def test_each_local_set_has_the_harness_metrics_and_its_rows_counted(model: LanguageModel, sets: Path) -> None:
    results = by_name(evaluate_tasks(model, BYTES, list(LOCAL_SETS), data_dir=sets))
    both = [
        (name, metric) for name in ("hellaswag", "piqa", "arc_easy", "arc_challenge") for metric in ("acc", "acc_norm")
    ]
    lambada = [("lambada_openai", "perplexity"), ("lambada_openai", "acc")]
    wikitext = [("wikitext", metric) for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    expected = [*lambada, *both, ("winogrande", "acc"), *wikitext]
    assert list(results) == [(f"local_{name}", metric) for name, metric in expected]
    rows = {name: len(ROWS[local.file]) if local.file in ROWS else 2 for name, local in LOCAL_SETS.items()}
    for (task, _), result in results.items():
        assert result.rows == result.rows_in_set == rows[task.removeprefix("local_")]


def test_only_the_first_rows_are_evaluated_where_that_is_asked_for(model: LanguageModel, sets: Path) -> None:
    (perplexity, acc) = evaluate_tasks(model, BYTES, ["local_lambada_openai"], data_dir=sets, limit=2)
    assert (acc.rows, acc.rows_in_set) == (perplexity.rows, perplexity.rows_in_set) == (2, 3)
    (alone, _) = evaluate_tasks(model, BYTES, ["lambada_openai"], data_dir=sets, limit=1)
    assert alone.value != perplexity.value
    assert alone.stderr is None


def test_the_perplexity_of_wikitext_is_a_word_and_a_byte(model: LanguageModel, sets: Path) -> None:
    """By the usual definitions: of what was read, detokenised, over words and bytes of what was there before."""
    results = by_name(evaluate_tasks(model, BYTES, ["wikitext"], data_dir=sets))
    bits = results["local_wikitext", "bits_per_byte"].value
    assert results["local_wikitext", "byte_perplexity"].value == pytest.approx(2**bits)
    text = WIKITEXT.removeprefix(" \n")
    size, words = len(text.encode()) - 1, len(text.split()) + 4  # the harness counts the ends of a page as words
    assert math.log(results["local_wikitext", "word_perplexity"].value) * words == pytest.approx(
        bits * math.log(2) * size, rel=1e-6
    )


def test_windows_change_a_long_document_only(model: LanguageModel, sets: Path) -> None:
    def bits(**settings: Any) -> float:
        results = evaluate_tasks(model, BYTES, ["wikitext"], data_dir=sets, **settings)
        return by_name(results)["local_wikitext", "bits_per_byte"].value

    assert bits(overlap=1) == pytest.approx(bits(), rel=1e-6)
    assert bits(overlap=1, max_length=16) != pytest.approx(bits(), rel=1e-6)


def test_standard_errors_are_the_harness_own(model: LanguageModel, sets: Path) -> None:
    results = by_name(evaluate_tasks(model, BYTES, ["arc_easy", "lambada_openai"], data_dir=sets))
    acc = results["local_arc_easy", "acc"]
    hits = round(acc.value * acc.rows)
    assert acc.stderr == pytest.approx(mean_stderr([1.0] * hits + [0.0] * (acc.rows - hits)))


def test_the_error_of_a_perplexity_is_that_of_its_exponent() -> None:
    logprobs = [-1.0, -2.0, -1.5, -0.5, -2.5]
    found = zero_shot._standard_error(metrics.perplexity, logprobs)
    step = mean_stderr(logprobs)
    assert found == pytest.approx((math.exp(1.5 + step * 1e-4) - math.exp(1.5)) * 1e4, rel=1e-3)
    assert zero_shot._standard_error(metrics.weighted_perplexity, logprobs) is None


@pytest.mark.usefixtures("paper")
def test_the_paper_never_stands_beside_a_local_set(model: LanguageModel, sets: Path) -> None:
    results = evaluate_tasks(model, BYTES, ["piqa"], data_dir=sets)
    assert [result.published for result in results] == [None, None]


@pytest.mark.usefixtures("hub", "paper")
def test_without_a_folder_the_hub_is_asked(model: LanguageModel, sets: Path) -> None:
    found = by_name(evaluate_tasks(model, BYTES, ["piqa"]))
    assert {name: result.published for name, result in found.items()} == {
        ("piqa", "acc"): 0.5,
        ("piqa", "acc_norm"): 0.5,
    }
    local = by_name(evaluate_tasks(model, BYTES, ["piqa"], data_dir=sets))
    assert {result.value for result in found.values()} == {result.value for result in local.values()}


@pytest.mark.usefixtures("hub")
def test_metrics_whose_mean_goes_without_saying_have_standard_errors_too(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the metrics in the harness's own definitions, a quarter names no aggregation."""
    lines = (Path(lm_eval.__file__).parent / "tasks" / "piqa" / "piqa.yaml").read_text().splitlines(keepends=True)
    (tmp_path / "piqa.yaml").write_text("".join(line for line in lines if "aggregation:" not in line))
    manager = partial(TaskManager, include_defaults=False, include_path=tmp_path)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    results = evaluate_tasks(model, BYTES, ["piqa"])
    assert len(results) == 2
    assert all(result.stderr is not None for result in results)


@pytest.mark.usefixtures("hub")
def test_a_hub_that_cannot_be_reached_is_told_in_one_sentence(model: LanguageModel) -> None:
    with pytest.raises(
        UserError, match=r"hellaswag cannot be had from the Hugging Face hub: connect .* by data_dir \("
    ):
        evaluate_tasks(model, BYTES, ["hellaswag"])


@pytest.mark.usefixtures("hub")
def test_names_that_are_no_task_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lm_eval has no task 'piqaa' \(did you mean 'piqa'\?\)"):
        evaluate_tasks(model, BYTES, ["piqaa"])
    file = tmp_path / "own.yaml"
    file.write_text("task: own\ndataset_path: baber/piqa\ndoc_to_text: !function own.run\n")
    with pytest.raises(UserError, match="lm_eval has no task"):
        evaluate_tasks(model, BYTES, [str(file)])


@pytest.mark.usefixtures("hub")
def test_code_that_a_model_writes_is_not_run(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_task.ConfigurableTask, "UNSAFE_CODE", True, raising=False)
    with pytest.raises(UserError, match="the task 'piqa' runs code that a model has written"):
        evaluate_tasks(model, BYTES, ["piqa"])


def test_a_limit_is_at_least_one_row(model: LanguageModel, sets: Path) -> None:
    with pytest.raises(UserError, match="limit must be 1 or more, got 0"):
        evaluate_tasks(model, BYTES, ["piqa"], data_dir=sets, limit=0)
