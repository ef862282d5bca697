"""``selective-ssm evaluate``: the figures of `evaluation.evaluate`."""

from __future__ import annotations

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
