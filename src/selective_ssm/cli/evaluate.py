"""``selective-ssm evaluate``: how well a checkpoint predicts whole documents, or answers the tasks of ``lm_eval``."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich
from jsonargparse.typing import PositiveInt

from selective_ssm.bench.report import table
from selective_ssm.bench.versions import commit, version, versions
from selective_ssm.cli.device import add_device, add_dtype, placement
from selective_ssm.config import to_tagged
from selective_ssm.data import Tokenizer, documents
from selective_ssm.errors import UserError
from selective_ssm.evaluation import Evaluation, TaskResult, evaluate, evaluate_tasks
from selective_ssm.files import check_place, write_json
from selective_ssm.generation import load

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selective_ssm.cli.parser import Parser
    from selective_ssm.models import LanguageModel

_OF_TASKS = ("data_dir", "limit", "max_length", "overlap")


def add_arguments(parser: Parser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("checkpoint", type=str, help="a checkpoint's folder")
    parser.add_argument("--data", type=str, help="documents: a file, a folder or a glob; or python_stdlib")
    parser.add_argument("--text-field", type=str, default="text", help="the field of a JSON line that holds the text")
    parser.add_argument("--tasks", type=str, help="tasks of lm_eval: lambada_openai,hellaswag,piqa,wikitext,…")
    parser.add_argument(
        "--data-dir", type=str, help="a folder with local files of the tasks; by default the hub's sets"
    )
    parser.add_argument("--limit", type=PositiveInt, help="only so many rows of each task")
    parser.add_argument(
        "--max-length",
        type=PositiveInt,
        help="the most tokens of a text that are read, the last ones; by default 2048",
    )
    parser.add_argument(
        "--overlap",
        type=PositiveInt,
        help="read documents in windows of max-length that share so many tokens; by default the state is carried",
    )
    parser.add_argument("--output", type=str, help="a file for the figures as JSON")
    add_device(parser)
    add_dtype(parser)


def run(options: Namespace) -> None:
    """Evaluate, print the figures, and write them where asked for."""
    if (options.data is None) == (options.tasks is None):
        raise UserError("give either --data, for documents, or --tasks, for tasks of lm_eval")
    if options.data is not None and (given := [name for name in _OF_TASKS if options[name] is not None]):
        raise UserError(f"--{given[0].replace('_', '-')} belongs to --tasks, and not to --data")
    if options.output is not None:
        check_place(options.output)
    model, tokenizer = load(options.checkpoint, **placement(options))
    if tokenizer is None:
        raise UserError(f"the checkpoint '{options.checkpoint}' has no tokenizer, so it cannot read text")
    found = _documents(options, model, tokenizer) if options.tasks is None else _tasks(options, model, tokenizer)
    if options.output is not None:
        write_json(Path(options.output), {**_circumstances(options, model), **found})
        print(f"written to {options.output}")


def _documents(options: Namespace, model: LanguageModel, tokenizer: Tokenizer) -> dict[str, Any]:
    result = evaluate(model, documents(options.data, text_field=options.text_field), tokenizer)
    _print(result)
    figures = {name: getattr(result, name) for name in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")}
    return {"data": options.data, "results": figures}


def _print(result: Evaluation) -> None:
    print(f"loss           {result.loss:.4f} nats a token")
    print(f"perplexity     {result.perplexity:.4f}")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    print(f"tokens         {result.tokens:,}")
    print(f"bytes          {result.bytes:,}")


def _tasks(options: Namespace, model: LanguageModel, tokenizer: Tokenizer) -> dict[str, Any]:
    settings = {name: options[name] for name in _OF_TASKS}
    results = evaluate_tasks(model, tokenizer, [name.strip() for name in options.tasks.split(",")], **settings)
    rich.print(table([_row(result) for result in results], title=f"'{options.checkpoint}' by lm_eval"))
    del settings["data_dir"]  # that the rows are local is in the tasks' names
    return {"lm_eval": version("lm_eval"), "settings": settings, "results": [asdict(result) for result in results]}


def _row(result: TaskResult) -> dict[str, Any]:
    rows = f"{result.rows:,}" + (f" of {result.rows_in_set:,}" if result.rows < result.rows_in_set else "")
    row = {"task": result.task, "metric": result.metric, "value": result.value, "± stderr": result.stderr, "rows": rows}
    return row if result.published is None else {**row, "paper": result.published}


def _circumstances(options: Namespace, model: LanguageModel) -> dict[str, Any]:
    """What figures need to be understood later."""
    return {
        "checkpoint": options.checkpoint,
        "config": to_tagged(model.config),
        "parameters": sum(model.num_parameters().values()),
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "versions": versions(),
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
