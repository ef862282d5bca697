"""Bad input gives exit 2 and one sentence that says what is wrong, and no traceback."""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path

import pytest

from selective_ssm.cli import main

RECIPE = "model: {d_model: 8, n_layer: 1, vocab_size: 257}\ndata: {source: text.txt}\ntrainer: {output: run}\n"


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main([str(word) for word in words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert re.fullmatch(r"selective-ssm: \S.*\n", told.err), "one sentence on one line"
    assert "Traceback" not in told.err
    return told.err


def test_missing_file(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    assert "there is no file or folder" in refused(capsys, "evaluate", checkpoint, "--data", tmp_path / "none.txt")
    assert "no such file or folder" in refused(capsys, "generate", tmp_path / "none")
    told = refused(capsys, "train", "--config", "stdlib_byte")
    assert "no recipe of that name (did you mean 'stdlib_bytes'?)" in told


def test_empty_file(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    assert "holds no text" in refused(capsys, "evaluate", checkpoint, "--data", empty)
    assert "it is empty" in refused(capsys, "train", "--config", empty)


def test_unknown_key(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE + "optimizer: {lrr: 1}\n")
    assert "unknown key 'optimizer.lrr' (did you mean 'optimizer.lr'?)" in refused(capsys, "train", "--config", recipe)
    told = refused(capsys, "train", "--config", "stdlib_bytes", "--trainer.max_step", "3")
    assert "unknown option '--trainer.max_step' (did you mean '--trainer.max_steps'?)" in told
    told = refused(capsys, "generate", checkpoint, "--temperatur", "1")
    assert "unknown option '--temperatur' (did you mean '--temperature'?)" in told, "no abbreviations"
    pattern = '[{"kind": "mamba", "ssm": {"kind": "s6", "d_stat": 3}}]'
    told = refused(capsys, "train", "--config", "stdlib_bytes", "--model.pattern", pattern)
    assert "model.pattern[0].ssm: unknown key 'd_stat' (did you mean 'd_state'?)" in told


def test_wrong_type(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("n_layer: 1", "n_layer: one"))
    assert "model.n_layer: expected int, got 'one'" in refused(capsys, "train", "--config", recipe)
    told = refused(capsys, "train", "--config", "stdlib_bytes", "--trainer.max_steps", "x")
    assert "trainer.max_steps: expected int or null, got 'x'" in told
    told = refused(capsys, "generate", checkpoint, "--dtype", "fp8")
    assert "expected one of 'fp32', 'bf16', 'fp16' or null, got 'fp8'" in told


def test_truncated_checkpoint(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in refused(capsys, "generate", copy)
    config = copy / "config.json"
    config.write_bytes(config.read_bytes()[:-20])
    assert "truncated" in refused(capsys, "info", copy)


def test_folder_that_is_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for verb in (("generate",), ("info",), ("evaluate", "--data", "python_stdlib")):
        assert "is not a checkpoint" in refused(capsys, *verb, tmp_path)
        assert "did you mean" not in refused(capsys, *verb, tmp_path)


def test_a_run_s_folder_names_its_last_checkpoint(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "last")
    for verb in (("generate",), ("info",), ("evaluate", "--data", "python_stdlib")):
        assert f"(did you mean '{tmp_path / 'last'}'?)" in refused(capsys, *verb, tmp_path)


def test_unreadable_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(b"\xff\xfe")
    assert "is not a UTF-8 text" in refused(capsys, "train", "--config", recipe)
    recipe.write_text("model:\n  - [")
    assert "is not valid YAML at line 2" in refused(capsys, "train", "--config", recipe)
    recipe.write_text("just words")
    assert "it holds a str" in refused(capsys, "train", "--config", recipe)
    assert "this is a folder" in refused(capsys, "train", "--config", tmp_path)


def test_prompt_of_undecodable_bytes(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_python_gets_it = b"ab\xff".decode("utf-8", "surrogateescape")
    assert "its byte 2 cannot be decoded" in refused(capsys, "generate", checkpoint, "--prompt", as_python_gets_it)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert "its byte 2 cannot be decoded" in refused(capsys, "generate", checkpoint, "--prompt", "-")


def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    words = ("generate", checkpoint, "--prompts", "prompts.txt")
    assert "--save-state is for one text, --prompts for many" in refused(capsys, *words, "--save-state", "state")
    assert "--prompt is for one text, --prompts for many" in refused(capsys, *words, "--prompt", "text")
    assert "--output is for the answers to --prompts" in refused(capsys, "generate", checkpoint, "--output", "out")
    assert "--logprobs is for the answers to --prompts" in refused(capsys, "generate", checkpoint, "--logprobs")


def test_bad_prompts(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, ids_checkpoint: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"

    def told(line: str, folder: Path = checkpoint) -> str:
        prompts.write_text(f'{{"prompt": "good"}}\n\n{line}\n')
        return refused(capsys, "generate", folder, "--prompts", prompts)

    assert f"{prompts}:3: unknown key 'temprature' (did you mean 'temperature'?)" in told('{"temprature": 1}')
    assert f"{prompts}:3 is not a JSON line" in told('{"prompt": ')
    assert f"{prompts}:3 must be a JSON object with a field 'prompt', got list" in told("[]")
    assert f"{prompts}:3: the key 'prompt' of a line is missing" in told('{"seed": 1}')
    assert f"{prompts}:3: prompt must be" in told('{"prompt": [1, "a"]}')
    assert f"{prompts}:3: top_p must be above 0" in told('{"prompt": "a", "top_p": 2}')
    assert f"{prompts}:3: token id 300 is outside" in told('{"prompt": [300]}')
    prompts.write_text('{"prompt": [1]}\n{"prompt": "a"}')
    assert f"{prompts}:2: the checkpoint has no tokenizer" in refused(
        capsys, "generate", ids_checkpoint, "--prompts", prompts
    )
    prompts.write_text("\n")
    assert "holds no prompts" in refused(capsys, "generate", checkpoint, "--prompts", prompts)
    assert "no such file" in refused(capsys, "generate", checkpoint, "--prompts", tmp_path / "none")


def test_bad_states(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    words = ("generate", checkpoint, "--state")
    assert "holds no state" in refused(capsys, *words, checkpoint / "model.safetensors")
    assert "no such file" in refused(capsys, *words, tmp_path / "none")
    state = tmp_path / "state"
    assert main(["generate", str(checkpoint), "--max-new-tokens", "1", "--save-state", str(state)]) == 0
    capsys.readouterr()
    assert "its weights were in float32" in refused(capsys, *words, state, "--dtype", "bf16")
    state.write_bytes(state.read_bytes()[:-9])
    assert "truncated" in refused(capsys, *words, state)


def test_a_state_that_cannot_be_saved_is_told_before_the_text(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    words = ("generate", checkpoint, "--prompt", "a", "--max-new-tokens", "5", "--save-state")
    assert "this is a folder, not a file" in refused(capsys, *words, tmp_path)
    (tmp_path / "file").touch()
    assert "a part of this path is a file" in refused(capsys, *words, tmp_path / "file" / "state")


def test_other_mistakes(capsys: pytest.CaptureFixture[str], checkpoint: Path, ids_checkpoint: Path) -> None:
    assert "too many words: 'more'" in refused(capsys, "generate", checkpoint, "more")
    assert "required: checkpoint" in refused(capsys, "generate")
    assert "--config takes them from" in refused(capsys, "train")
    assert "top_p must be above 0" in refused(capsys, "generate", checkpoint, "--top-p", "2")
    assert "--stop-id must be a token id, got '3 x'" in refused(
        capsys, "generate", checkpoint, "--stop-id", "3", "--stop-id", "x"
    )
    assert "has no tokenizer" in refused(capsys, "evaluate", ids_checkpoint, "--data", "python_stdlib")
    assert "give token ids such as" in refused(capsys, "generate", ids_checkpoint, "--prompt", "text")
    assert "the device 'nowhere' cannot be used" in refused(capsys, "generate", checkpoint, "--device", "nowhere")
    assert "the device 'meta' holds no values" in refused(capsys, "generate", checkpoint, "--device", "meta:0")
    assert "did you mean 'mamba-130m'?" in refused(capsys, "info", "mamba-130")
    assert "did you mean 'stdlib_bytes'?" in refused(capsys, "recipes", "stdlib_byte")
