"""``selective-ssm convert``: from a folder to any format, in one command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

from selective_ssm.cli import main
from selective_ssm.models import LanguageModel


@pytest.mark.parametrize(
    "theirs",
    [
        MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=40, state_size=8)),
        FalconMambaForCausalLM(FalconMambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=40, conv_kernel=3)),
    ],
    ids=["mamba", "falcon_mamba"],
)
def test_a_model_of_transformers_comes_and_goes(
    theirs: MambaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs.save_pretrained(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--to", "ours"]) == 0
    assert f"the model is in '{tmp_path / 'ours'}'" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "hf"]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    ids = torch.randint(40, (1, 12))
    with torch.no_grad():
        expected = theirs.eval()(ids, use_cache=False).logits
        actual = type(theirs).from_pretrained(tmp_path / "back").eval()(ids, use_cache=False).logits
        ours = LanguageModel.from_pretrained(tmp_path / "ours")(ids).logits
    assert torch.equal(actual, expected)
    assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_every_format_and_dtype(checkpoint: Path, tmp_path: Path) -> None:
    for to, file in (("state-spaces", "pytorch_model.bin"), ("hf", "model.safetensors"), ("ours", "model.safetensors")):
        assert main(["convert", str(checkpoint), str(tmp_path / to), "--to", to, "--dtype", "bf16"]) == 0
        assert (tmp_path / to / file).exists()
        assert main(["generate", str(tmp_path / to), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert main(["convert", str(checkpoint), str(tmp_path / "model.gguf"), "--to", "gguf", "--dtype", "fp16"]) == 0
    assert (tmp_path / "model.gguf").exists()


def test_a_tokenizer_may_be_named(ids_checkpoint: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "model.gguf")
    assert main(["convert", str(ids_checkpoint), target, "--to", "gguf"]) == 2
    assert main(["convert", str(ids_checkpoint), target, "--to", "gguf", "--tokenizer", "bytes"]) == 0


def test_mistakes_are_one_sentence(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: str | Path) -> str:
        assert main(["convert", *map(str, words)]) == 2
        told = capsys.readouterr().err
        assert len(told.splitlines()) == 1
        return told

    assert "choose a new folder" in refused(checkpoint, checkpoint, "--to", "hf")
    assert "expected one of 'ours', 'hf', 'state-spaces', 'gguf', got 'onnx'" in refused("a", "b", "--to", "onnx")
    assert "no such file or folder" in refused(tmp_path / "none", tmp_path / "end", "--to", "hf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    told = refused(checkpoint, tmp_path / "model.gguf", "--to", "gguf")
    assert "this needs the package 'gguf', which is not installed: pip install 'selective-ssm[gguf]'" in told
