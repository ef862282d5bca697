"""``selective-ssm generate``: text out, ids where there is no tokenizer; many prompts from a file; states in files."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selective_ssm.cli import generate as verb
from selective_ssm.cli import main
from selective_ssm.generation import generate, load, stream


def written(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


def answered(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written(capsys, *words).splitlines()]


def test_options_reach_the_sampler(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load(checkpoint)
    assert tokenizer is not None
    wishes = {"temperature": 0.7, "top_k": 90, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3, "seed": 4}
    limits = {"max_new_tokens": 40, "stop": ["Q"], "stop_ids": [0, 1]}
    expected = "".join(stream(model, "é", tokenizer=tokenizer, **limits, **wishes))
    options = [word for name, value in wishes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words = ("--prompt", "é", "--max-new-tokens", "40", "--stop", "Q", "--stop", "\0\0", *options)
    words = (*words, "--stop-id", "0", "--stop-id", "1")
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


def test_prompts_of_a_text_file_are_answered_in_their_order(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = ["a longer prompt", "é", "", "é"]
    (tmp_path / "prompts.txt").write_text("\r\n".join(prompts) + "\n")
    model, tokenizer = load(checkpoint)
    expected = generate(model, prompts, tokenizer=tokenizer, max_new_tokens=9, seed=5, logprobs=True)
    words = (checkpoint, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", "9", "--seed", "5", "--batch", "2")
    answers = answered(capsys, *words)
    assert [list(answer) for answer in answers] == [["prompt", "text", "finish", "tokens"]] * 4
    assert [(one["prompt"], one["text"]) for one in answers] == [
        (prompt, one.text) for prompt, one in zip(prompts, expected, strict=True)
    ]
    with_logprobs = answered(capsys, *words, "--logprobs")
    assert [(one["ids"], one["finish"], one["tokens"]) for one in with_logprobs] == [
        (one.ids, one.finish, len(one.ids)) for one in expected
    ]
    assert [one["logprobs"] for one in with_logprobs] == [pytest.approx(one.logprobs) for one in expected]


def test_a_json_line_has_its_own_options(checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = [
        {"prompt": "one", "temperature": 0, "max_new_tokens": 3},
        {"prompt": [101, 102], "seed": 7, "stop": "Q", "top_k": 90},
        {"prompt": "one", "stop": ["Q", "R"], "stop_ids": [3], "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 2},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    model, tokenizer = load(checkpoint)
    words = ("--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", "8", "--seed", "2")
    answers = answered(capsys, checkpoint, *words)
    for line, answer in zip(lines, answers, strict=True):
        options = {"max_new_tokens": 8, "seed": 2} | line
        (alone,) = generate(model, [options.pop("prompt")], tokenizer=tokenizer, **options)
        assert (answer["text"], answer["finish"], answer["tokens"]) == (alone.text, alone.finish, len(alone.ids))
    assert [answer["prompt"] for answer in answers] == [line["prompt"] for line in lines]


@pytest.mark.parametrize("content", ["5 6\n7,8\n", '{"prompt": [5, 6]}\n{"prompt": "7 8"}\n'])
def test_a_dash_reads_prompts_from_the_standard_input(
    content: str, ids_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    answers = answered(capsys, ids_checkpoint, "--prompts", "-", "--max-new-tokens", "6")
    expected = generate(load(ids_checkpoint)[0], [[5, 6], [7, 8]], max_new_tokens=6)
    assert [answer["ids"] for answer in answers] == [one.ids for one in expected]
    assert "text" not in answers[0]


def test_answers_go_into_a_file_that_is_whole_or_not_there(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("é\nb")
    words = (checkpoint, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", "4")
    shown = written(capsys, *words)
    assert written(capsys, *words, "--output", tmp_path / "new" / "answers.jsonl") == ""
    assert (tmp_path / "new" / "answers.jsonl").read_text() == shown
    assert "é" in shown, "as it is, not escaped"

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "_described", fails)
    assert main(["generate", *map(str, words), "--output", str(tmp_path / "none" / "answers.jsonl")]) == 130
    assert list((tmp_path / "none").iterdir()) == []


def test_a_text_goes_on_from_a_saved_state(
    ids_checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"

    def ids(*words: str | Path) -> list[int]:
        return list(map(int, written(capsys, ids_checkpoint, *words, "--temperature", "0.8").split()))

    whole = ids("--prompt", "5 6", "--max-new-tokens", "12", "--seed", "4")
    begun = ids("--prompt", "5 6", "--max-new-tokens", "5", "--seed", "4", "--save-state", first)
    assert begun + ids("--state", first, "--max-new-tokens", "7") == whole, "with the seed of before"

    assert ids("--state", first, "--prompt", "7 8", "--max-new-tokens", "0", "--save-state", second) == []
    text = " ".join(map(str, [5, 6, *begun, 7, 8]))
    expected = ids("--prompt", text, "--max-new-tokens", "6", "--seed", "4")
    assert ids("--state", second, "--max-new-tokens", "6") == expected

    (tmp_path / "prompts.jsonl").write_text('{"prompt": [7, 8]}\n{"prompt": [9]}')
    words = ("--state", first, "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", "6", "--temperature", "0.8")
    assert answered(capsys, ids_checkpoint, *words)[0]["ids"] == expected


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals like these")
def test_ctrl_c_keeps_the_state_of_what_is_there(
    ids_checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(pieces: Iterator[int]) -> None:
        for count, piece in enumerate(pieces):
            print(piece)
            if count == 4:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(verb, "_show", interrupted)
    words = ("generate", str(ids_checkpoint), "--prompt", "5 6", "--max-new-tokens")
    assert main([*words, "1000000", "--save-state", str(tmp_path / "state")]) == 130
    begun = list(map(int, capsys.readouterr().out.split()))
    monkeypatch.undo()
    rest = written(capsys, ids_checkpoint, "--state", tmp_path / "state", "--max-new-tokens", "6")
    whole = written(capsys, *words[1:], str(len(begun) + 6))
    assert [*begun, *map(int, rest.split())] == list(map(int, whole.split()))
