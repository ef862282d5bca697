"""Local tasks ask and count what the harness's own tasks of these sets do."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks._yaml_loader import load_yaml

from selective_ssm.errors import FileProblem, UserError
from selective_ssm.evaluation.local_tasks import LOCAL_SETS, local_task
from tests.evaluation.rows import ROWS, WIKITEXT

YAML = {
    "lambada_openai": "lambada/lambada_openai",
    "hellaswag": "hellaswag/hellaswag",
    "piqa": "piqa/piqa",
    "arc_easy": "arc/arc_easy",
    "arc_challenge": "arc/arc_challenge",
    "winogrande": "winogrande/default",
    "wikitext": "wikitext/wikitext",
}


def as_on_the_hub(name: str) -> list[dict[str, Any]]:
    """The rows of a small file with the fields that the hub's set has."""
    if name == "wikitext":
        first, second = WIKITEXT.split(" \n = Another")
        return [{"page": first.removeprefix(" \n") + " "}, {"page": f" = Another{second}"}]
    rows = ROWS[LOCAL_SETS[name].file]
    if name.startswith("arc"):
        return [
            {
                "question": row["question"],
                "choices": {"text": row["choices"], "label": list("ABCDE"[: len(row["choices"])])},
                "answerKey": "ABCDE"[row["gold"]],
            }
            for row in rows
        ]
    if name == "hellaswag":  # what its process_docs makes of the hub's fields
        return [row | {"label": str(row["gold"])} for row in rows]
    return rows


def theirs(name: str) -> Task:
    """The harness's own task, on our rows."""
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{YAML[name]}.yaml", resolve_func=True)
    for field in ("tag", "training_split", "validation_split", "process_docs"):
        config.pop(field, None)

    class Theirs(ConfigurableTask):
        def download(self, *_: object, **__: object) -> None:
            self.dataset = {"test": Dataset.from_list(as_on_the_hub(name))}

    return Theirs(config={**config, "test_split": "test"})


def asked(task: Task) -> list[tuple[str, tuple[Any, ...]]]:
    """What a task asks of a model."""
    task.build_all_requests()
    return [(one.request_type, one.args) for one in task.instances]


def counted(task: Task, answer: Callable[[int], Any]) -> list[dict[str, Any]]:
    """What a task makes of answers."""
    found: list[dict[str, Any]] = []
    for place, row in enumerate(task.eval_docs):
        answers = [answer(number) for number, one in enumerate(task.instances) if one.doc_id == place]
        found.append(task.process_results(row, answers))
    return found


@pytest.mark.parametrize("name", LOCAL_SETS)
def test_a_local_task_is_the_harness_own_on_other_rows(name: str, sets: Path) -> None:
    ours, own = local_task(name, sets), theirs(name)
    assert ours.task_name == f"local_{name}"
    assert asked(ours) == asked(own)

    def answer(number: int) -> Any:
        logprob = -float(hash((number, 7)) % 1000) / 10
        return logprob if name == "wikitext" else (logprob, number % 3 == 0)

    assert counted(ours, answer) == counted(own, answer)
    assert ours.aggregation() == own.aggregation()
    assert ours.higher_is_better() == own.higher_is_better()
    assert ours.config.target_delimiter == own.config.target_delimiter


def test_an_answer_is_asked_for_after_its_context(sets: Path) -> None:
    """Written out, as a guard against both being wrong."""
    assert asked(local_task("piqa", sets))[:2] == [
        ("loglikelihood", ("Question: How do I open a jar?\nAnswer:", " Turn the lid. ")),
        ("loglikelihood", ("Question: How do I open a jar?\nAnswer:", " Turn the jar's label over.")),
    ]
    assert asked(local_task("winogrande", sets))[:2] == [
        ("loglikelihood", ("Ann taught Bea as Ann", " knew more.")),
        ("loglikelihood", ("Ann taught Bea as Bea", " knew more.")),
    ]
    assert asked(local_task("lambada_openai", sets))[1:] == [
        ("loglikelihood", ("One two three ", " two")),
        ("loglikelihood", ("Il pleut à", " Paris")),
    ]


def test_wikitext_is_a_page_an_article(data: Path) -> None:
    pages = [row["page"] for row in local_task("wikitext", data / "wikitext2_valid_test").eval_docs]
    assert len(pages) == 62
    assert all(page.startswith(" = ") for page in pages)
    with gzip.open(data / "wikitext2_valid_test" / "wiki.test.tokens.gz", "rt", encoding="utf-8") as file:
        assert "\n".join(pages) == file.read().removeprefix(" \n")


def test_the_sets_have_the_rows_that_they_should(data: Path) -> None:
    rows = {name: len(local_task(name, data / "zeroshot").eval_docs) for name in LOCAL_SETS if name != "wikitext"}
    assert rows == {
        "lambada_openai": 5153,
        "hellaswag": 1000,
        "piqa": 1838,
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "winogrande": 1267,
    }


def test_what_is_no_local_set_is_refused(sets: Path) -> None:
    with pytest.raises(UserError, match=r"local task must be one of .* got 'hellaswg' \(did you mean 'hellaswag'\?\)"):
        local_task("hellaswg", sets)


def test_a_file_that_is_missing_or_another_set_is_refused(sets: Path, tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match="piqa_valid.jsonl.gz': there is no such file"):
        local_task("piqa", tmp_path)
    (tmp_path / "piqa_valid.jsonl.gz").write_bytes((sets / "arc_easy_test.jsonl.gz").read_bytes())
    with pytest.raises(UserError, match="is not the set that was asked for: row 1 has no 'goal'"):
        local_task("piqa", tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("piqa", "\n", "it holds no rows"),
        ("wikitext", " \n \n", "it holds no rows"),
        ("piqa", '{"goal": "a", "sol1": "b", "sol2": "c", "label": 7}', "row 1 cannot have 7 as its 'label'"),
        ("hellaswag", '{"query": "a", "choices": "bc", "gold": 0}', "row 1 cannot have 'bc' as its 'choices'"),
        ("arc_easy", '{"question": "a", "choices": ["b"], "gold": 1}', "row 1 cannot have 1 as its 'gold'"),
        ("lambada_openai", '{"text": "a b"}\n{"text": 5}', "row 2 cannot have 5 as its 'text'"),
        (
            "winogrande",
            '{"sentence": "a", "option1": "b", "option2": "c", "answer": "1"}',
            "row 1 cannot have 'a' as its 'sentence'",
        ),
    ],
)
def test_rows_that_ask_for_nothing_are_refused(name: str, text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / LOCAL_SETS[name].file).write_bytes(gzip.compress(text.encode()))
    with pytest.raises(UserError, match=f"is not the set that was asked for: {sentence}"):
        local_task(name, tmp_path)
