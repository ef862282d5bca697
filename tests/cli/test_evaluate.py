"""``selective-ssm evaluate``: the figures of `evaluation.evaluate` and `evaluation.evaluate_tasks`."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from selective_ssm.cli import main
from selective_ssm.data import documents
from selective_ssm.evaluation import evaluate
from selective_ssm.generation import load


def test_the_field_of_json_lines_can_be_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"body": "four"}\n')
    assert main(["evaluate", str(checkpoint), "--data", str(lines), "--text-field", "body"]) == 0
    assert "bytes          4\n" in capsys.readouterr().out


def test_the_figures_are_those_of_the_library(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("first " * 20)
    (tmp_path / "b.txt").write_text("second " * 30)
    model, tokenizer = load(checkpoint)
    assert tokenizer is not None
    expected = evaluate(model, documents(tmp_path), tokenizer)
    assert main(["evaluate", str(checkpoint), "--data", str(tmp_path)]) == 0
    lines = [line.rsplit(maxsplit=1 if "nats" not in line else 4) for line in capsys.readouterr().out.splitlines()]
    assert {line[0].strip(): line[1] for line in lines} == {
        "loss": f"{expected.loss:.4f}",
        "perplexity": f"{expected.perplexity:.4f}",
        "bits per byte": f"{expected.bits_per_byte:.4f}",
        "tokens": "332",
        "bytes": "330",
    }


def test_tasks_are_told_and_written(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "arc_easy_test.jsonl.gz").write_bytes(
        gzip.compress(b'{"question": "What melts?", "choices": ["ice", "fire"], "gold": 0}\n' * 3)
    )
    output = tmp_path / "figures" / "arc.json"
    words = ["--tasks", "arc_easy", "--data-dir", str(tmp_path), "--limit", "2", "--output", str(output)]
    assert main(["evaluate", str(checkpoint), *words]) == 0
    written = json.loads(output.read_text())
    assert [(row["task"], row["metric"], row["rows"], row["rows_in_set"]) for row in written["results"]] == [
        ("local_arc_easy", "acc", 2, 3),
        ("local_arc_easy", "acc_norm", 2, 3),
    ]
    assert written["settings"] == {"limit": 2, "max_length": None, "overlap": None}
    assert written["parameters"] == sum(load(checkpoint)[0].num_parameters().values())
    assert {"lm_eval", "commit", "versions", "time", "checkpoint", "config", "dtype"} <= set(written)
    told = capsys.readouterr().out
    assert "2 of 3" in told
    assert "paper" not in told
    assert f"written to {output}" in told


def test_figures_of_documents_are_written_too(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    output = tmp_path / "figures.json"
    assert main(["evaluate", str(checkpoint), "--data", str(tmp_path / "a.txt"), "--output", str(output)]) == 0
    model, tokenizer = load(checkpoint)
    assert tokenizer is not None
    expected = evaluate(model, documents(tmp_path / "a.txt"), tokenizer)
    written = json.loads(output.read_text())["results"]
    assert (written["tokens"], written["bytes"]) == (10, 9)
    assert written["bits_per_byte"] == pytest.approx(expected.bits_per_byte)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give either --data, for documents, or --tasks"),
        (["--data", "python_stdlib", "--tasks", "piqa"], "give either --data, for documents, or --tasks"),
        (["--data", "python_stdlib", "--data-dir", "sets"], "--data-dir belongs to --tasks, and not to --data"),
        (["--data", "python_stdlib", "--limit", "3"], "--limit belongs to --tasks, and not to --data"),
        (["--tasks", "piqa", "--data-dir", "none"], "cannot read 'none/piqa_valid.jsonl.gz': there is no such file"),
        (["--tasks", "squad", "--data-dir", "none"], "local task must be one of 'lambada_openai'"),
    ],
)
def test_wishes_that_do_not_fit_are_refused(
    checkpoint: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(checkpoint), *words]) == 2
    assert sentence in capsys.readouterr().err


def test_the_package_that_tasks_need_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    assert main(["evaluate", str(checkpoint), "--tasks", "piqa"]) == 2
    assert "'lm_eval', which is not installed: pip install 'selective-ssm[evaluation]'" in capsys.readouterr().err
