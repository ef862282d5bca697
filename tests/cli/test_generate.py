"""``selective-ssm generate``: text out, ids where there is no tokenizer."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from selective_ssm.cli import main
from selective_ssm.generation import load, stream


def written(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_options_reach_the_sampler(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load(checkpoint)
    assert tokenizer is not None
    wishes = {"temperature": 0.7, "top_k": 90, "top_p": 0.9, "min_p": 0.1, "seed": 4}
    expected = "".join(stream(model, "é", tokenizer=tokenizer, max_new_tokens=40, stop=["Q"], **wishes))
    options = [word for name, value in wishes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words = ("--prompt", "é", "--max-new-tokens", "40", "--stop", "Q", "--stop", "\0\0", *options)
    assert written(capsys, checkpoint, *words) == f"{expected}\n"


def test_a_dash_reads_the_prompt_from_the_standard_input(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("two\nlines é".encode())))
    from_input = written(capsys, checkpoint, "--prompt", "-", "--max-new-tokens", "9")
    assert from_input == written(capsys, checkpoint, "--prompt", "two\nlines é", "--max-new-tokens", "9")


def test_an_empty_prompt_is_allowed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = written(capsys, checkpoint, "--max-new-tokens", "9")
    assert len(without) > 1
    assert written(capsys, checkpoint, "--max-new-tokens", "9", "--prompt", "") == without


def test_without_a_tokenizer_ids_go_in_and_out(ids_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = load(ids_checkpoint)
    expected = list(stream(model, [5, 6, 7], max_new_tokens=4))
    assert main(["generate", str(ids_checkpoint), "--prompt", "5 6,7", "--max-new-tokens", "4"]) == 0
    told = capsys.readouterr()
    assert [int(word) for word in told.out.split()] == expected
    assert "has no tokenizer: prompt and answer are token ids" in told.err
