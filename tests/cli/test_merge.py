"""``train`` beside a checkpoint, and ``merge``: adapters become a checkpoint that the other verbs take."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from selective_ssm.cli import main
from selective_ssm.files import read_tensors

LORA_TEXT = ("train", "--config", "lora_text", "--data.source", "text.txt", "--data.row_length", "16")


@pytest.fixture
def words(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that runs the recipe on a text here, beside a small checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text " * 50)
    return [*LORA_TEXT, "--base", str(checkpoint), "--data.cache", "cache", "--trainer.max_steps", "2"]


def test_the_recipe_trains_adapters_that_can_be_merged(
    words: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="needs the package peft")
    assert main([*words, "--lora.r", "2", "--lora.targets", "[in_proj, dt_proj]"]) == 0
    assert "the model is in 'runs/lora_text/last'" in capsys.readouterr().out
    assert main(["merge", str(checkpoint), "runs/lora_text/last/adapter", "merged"]) == 0
    assert "the model is in 'merged'" in capsys.readouterr().out
    before, last, merged = (
        read_tensors(folder / "model.safetensors")
        for folder in (checkpoint, Path("runs/lora_text/last"), Path("merged"))
    )
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {"in_proj", "dt_proj"}
    assert all(torch.equal(last[name], merged[name]) for name in last)
    for folder in ("runs/lora_text/last", "merged"):
        assert main(["generate", folder, "--prompt", "some", "--max-new-tokens", "3"]) == 0
        assert main(["evaluate", folder, "--data", "text.txt"]) == 0
    assert main([*words, "--config", "runs/lora_text/last/train.json", "--trainer.max_steps", "3"]) == 0
    assert "the run went on from step 2 to step 3" in capsys.readouterr().out


def test_what_cannot_be_is_told(words: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {
        ("--model.d_model", "8"): "model: the key 'n_layer' of language_model is missing",
        ("--lora.r", "0", "--lora.alpha", "3"): "alpha and targets are of adapters",
        ("--lora.targets", "[conv1d]"): "targets must be one of 'in_proj'",
        ("--base", "nowhere"): "'nowhere'",
    }
    for others, sentence in told.items():
        assert main([*words, *others]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["merge", str(checkpoint), "nowhere", "merged"]) == 2
    assert "adapter_config.json': there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "merge"])
def test_without_peft_the_way_to_it_is_told(
    verb: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(words if verb == "train" else ["merge", "a", "b", "c"]) == 2
    assert "pip install 'selective-ssm[peft]'" in capsys.readouterr().err
