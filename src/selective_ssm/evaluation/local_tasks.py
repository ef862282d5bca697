"""Tasks of the evaluation harness on local files: what it asks and counts for its own sets, here built in code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from selective_ssm.data.sources import documents, records
from selective_ssm.errors import UserError, choice, require

if TYPE_CHECKING:
    from lm_eval.api.task import Task

PREFIX = "local_"
"""Before the names of local tasks: the files may hold fewer rows than the harness's sets, or other texts."""


def local_task(name: str, data_dir: str | Path) -> Task:
    """A task of the harness with the rows of a local file.

    Prompts, answers and metrics are those of the harness's own task of that name, without its choice of rows.

    Args:
        name: a key of `LOCAL_SETS`.
        data_dir: the folder with the set's file, whose name `LOCAL_SETS` has.

    Returns:
        The task, whose name is the given one after "local_".

    Raises:
        MissingPackage: ``lm_eval`` is not installed.
        UserError: there is no such set, or its file is missing, damaged or holds something else.
    """
    choice("local task", name, LOCAL_SETS)
    base = require("lm_eval.api.task", extra="evaluation").ConfigurableTask
    dataset = require("datasets", extra="evaluation").Dataset
    local = LOCAL_SETS[name]
    path = Path(data_dir).expanduser() / local.file
    rows = list(local.rows(path))
    if not rows:
        raise UserError(f"'{path}' is not the set that was asked for: it holds no rows")

    class LocalTask(base):
        def download(self, *_: object, **__: object) -> None:
            self.dataset = {"test": dataset.from_list(rows)}

    return LocalTask(config={**local.config(), "task": PREFIX + name, "test_split": "test"})


class _LocalSet(NamedTuple):
    file: str
    rows: Callable[[Path], Iterator[Mapping[str, Any]]]
    config: Callable[[], dict[str, Any]]
    """What the harness's definition of the set says of prompts, answers and metrics."""


_Check = Callable[[Any, Mapping[str, Any]], bool]
"""Whether a field's value is what the set has there, in a row whose fields before it are."""


def _rows_with(**fields: _Check) -> Callable[[Path], Iterator[Mapping[str, Any]]]:
    """A reader of JSON lines that must have these fields."""

    def rows(path: Path) -> Iterator[Mapping[str, Any]]:
        for number, record in enumerate(records(path), start=1):
            where = f"'{path}' is not the set that was asked for: row {number}"
            for field, is_right in fields.items():
                if field not in record:
                    raise UserError(f"{where} has no '{field}'")
                if not is_right(record[field], record):
                    raise UserError(f"{where} cannot have {record[field]!r} as its '{field}'")
            yield record

    return rows


def _is_text(value: Any, _: Mapping[str, Any]) -> bool:
    return isinstance(value, str)


def _has_gap(value: Any, _: Mapping[str, Any]) -> bool:
    return isinstance(value, str) and "_" in value


def _is_texts(value: Any, _: Mapping[str, Any]) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in cast("list[Any]", value))


def _is_choice(value: Any, row: Mapping[str, Any]) -> bool:
    return value in range(len(row["choices"]))


def _is_in(*answers: Any) -> _Check:
    return lambda value, _: value in answers


def _pages(path: Path) -> Iterator[Mapping[str, Any]]:
    """The articles of a file of WikiText, each from its title on, as the harness's set has them."""
    (text,) = (document.text.decode(errors="replace") for document in documents(path))
    page: list[str] = []
    for line in text.split("\n"):
        if _TITLE.fullmatch(line.strip()):
            if any(map(str.strip, page)):
                yield {"page": "\n".join(page)}
            page = []
        page.append(line)
    if any(map(str.strip, page)):
        yield {"page": "\n".join(page)}


_TITLE = re.compile(r"= (?!=).*(?<!=) =")


def _metrics(*names: str) -> list[dict[str, Any]]:
    """Metrics that are means of a number a row; a perplexity is exp(−mean)."""
    return [
        {
            "metric": name,
            "aggregation": "perplexity" if name == "perplexity" else "mean",
            "higher_is_better": name != "perplexity",
        }
        for name in names
    ]


def _lambada() -> dict[str, Any]:
    return {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": _metrics("perplexity", "acc"),
    }


def _hellaswag() -> dict[str, Any]:
    return _multiple_choice(doc_to_text="{{query}}", doc_to_target="{{gold}}", doc_to_choice="choices")


def _piqa() -> dict[str, Any]:
    return _multiple_choice(
        doc_to_text="Question: {{goal}}\nAnswer:", doc_to_target="label", doc_to_choice="{{[sol1, sol2]}}"
    )


def _arc() -> dict[str, Any]:
    return _multiple_choice(
        doc_to_text="Question: {{question}}\nAnswer:", doc_to_target="gold", doc_to_choice="choices"
    )


def _winogrande() -> dict[str, Any]:
    own = require("lm_eval.tasks.winogrande.preprocess_winogrande", extra="evaluation")
    fields = {name: getattr(own, name) for name in ("doc_to_text", "doc_to_target", "doc_to_choice")}
    return _multiple_choice(**fields) | {"metric_list": _metrics("acc")}


def _multiple_choice(**fields: Any) -> dict[str, Any]:
    return {"output_type": "multiple_choice", "metric_list": _metrics("acc", "acc_norm"), **fields}


def _wikitext() -> dict[str, Any]:
    own = require("lm_eval.tasks.wikitext.preprocess_wikitext", extra="evaluation")
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": own.wikitext_detokenizer,
        "process_results": own.process_results,
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    }


_ARC_ROWS = _rows_with(question=_is_text, choices=_is_texts, gold=_is_choice)

LOCAL_SETS: dict[str, _LocalSet] = {
    "lambada_openai": _LocalSet("lambada_openai_test.jsonl.gz", _rows_with(text=_is_text), _lambada),
    "hellaswag": _LocalSet(
        "hellaswag_val_1000.jsonl.gz", _rows_with(query=_is_text, choices=_is_texts, gold=_is_choice), _hellaswag
    ),
    "piqa": _LocalSet(
        "piqa_valid.jsonl.gz", _rows_with(goal=_is_text, sol1=_is_text, sol2=_is_text, label=_is_in(0, 1)), _piqa
    ),
    "arc_easy": _LocalSet("arc_easy_test.jsonl.gz", _ARC_ROWS, _arc),
    "arc_challenge": _LocalSet("arc_challenge_test.jsonl.gz", _ARC_ROWS, _arc),
    "winogrande": _LocalSet(
        "winogrande_xl_dev.jsonl.gz",
        _rows_with(sentence=_has_gap, option1=_is_text, option2=_is_text, answer=_is_in("1", "2")),
        _winogrande,
    ),
    "wikitext": _LocalSet("wiki.test.tokens.gz", _pages, _wikitext),
}
"""The sets that `local_task` knows, by the names of the harness's tasks."""
