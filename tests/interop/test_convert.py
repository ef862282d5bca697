"""Checkpoints go from any format to any other and come back bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MambaForCausalLM

from selective_ssm.data import ByteTokenizer, load_tokenizer
from selective_ssm.errors import FileProblem, UserError
from selective_ssm.interop.convert import TARGETS, convert
from selective_ssm.layers import MambaConfig, S6Config
from selective_ssm.models import LanguageModel, LanguageModelConfig

PLAIN = LanguageModelConfig(d_model=16, n_layer=2, vocab_size=264, pattern=(MambaConfig(ssm=S6Config(d_state=4)),))
NORMED = dataclasses.replace(PLAIN, pattern=(MambaConfig(bias=True, ssm=S6Config(d_state=4, norm_eps=1e-5)),))
SOURCES = {"ours": "selective_ssm", "hf": "mamba", "falcon": "falcon_mamba", "state-spaces": "state-spaces"}


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    model = LanguageModel(NORMED if name == "falcon" else PLAIN).to(dtype)
    model.save_pretrained(folder, model_type=SOURCES[name])
    ByteTokenizer().save(folder)
    return folder


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    pickled = folder / "pytorch_model.bin"
    return torch.load(pickled, weights_only=True) if pickled.exists() else load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("source", "ways"),
    [
        ("ours", ["hf", "ours"]),
        ("ours", ["state-spaces", "hf", "ours"]),
        ("hf", ["ours", "hf"]),
        ("hf", ["state-spaces", "hf"]),
        ("falcon", ["ours", "hf"]),
        ("state-spaces", ["ours", "state-spaces"]),
        ("state-spaces", ["hf", "state-spaces"]),
    ],
)
def test_a_way_and_back_keeps_every_bit(source: str, ways: list[str], dtype: torch.dtype, tmp_path: Path) -> None:
    start = folder = save(tmp_path / "start", source, dtype)
    for number, to in enumerate(ways):
        convert(folder, tmp_path / str(number), to)
        folder = tmp_path / str(number)
    before, after = weights_in(start), weights_in(folder)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
        assert tensor.dtype == after[name].dtype == dtype, name
    assert isinstance(load_tokenizer(folder), ByteTokenizer)
    assert (folder / "README.md").read_text() == (start / "README.md").read_text()


@pytest.mark.parametrize("to", ["ours", "hf", "state-spaces"])
def test_another_dtype(to: str, tmp_path: Path) -> None:
    save(tmp_path / "start", "ours")
    convert(tmp_path / "start", tmp_path / "end", to, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in weights_in(tmp_path / "end").values()} == {torch.bfloat16}
    expected = LanguageModel.from_pretrained(tmp_path / "start", dtype=torch.bfloat16).state_dict()
    found = LanguageModel.from_pretrained(tmp_path / "end").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if to == "state-spaces":
        tied = weights_in(tmp_path / "end")
        assert tied["lm_head.weight"].data_ptr() == tied["backbone.embedding.weight"].data_ptr()


def test_shards_from_shards(tmp_path: Path) -> None:
    save(tmp_path / "start", "ours")
    convert(tmp_path / "start", tmp_path / "shards", "hf", shard_bytes=4000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    convert(tmp_path / "shards", tmp_path / "end", "ours", shard_bytes=8000)
    before = LanguageModel.from_pretrained(tmp_path / "start").state_dict()
    after = LanguageModel.from_pretrained(tmp_path / "end").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_lies_beside_goes_along(tmp_path: Path) -> None:
    save(tmp_path / "start", "hf")
    (tmp_path / "start" / "README.md").write_text("theirs")
    for name in ("LICENSE", "LICENSE-MODEL.txt"):
        (tmp_path / "start" / name).write_text("terms")
    (tmp_path / "start" / "LICENSES").mkdir()
    (tmp_path / "start" / "resume.ckpt").write_text("not a part of the model")
    convert(tmp_path / "start", tmp_path / "end", "ours")
    names = {"LICENSE", "LICENSE-MODEL.txt", "README.md", "config.json", "model.safetensors", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "end").iterdir()} == names
    assert (tmp_path / "end" / "README.md").read_text() == "theirs"


@pytest.mark.parametrize("name", ["ours", "state-spaces"])
def test_transformers_end_a_text_where_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    convert(save(tmp_path / "start", name), tmp_path / "end", "hf")
    settings = MambaForCausalLM.from_pretrained(tmp_path / "end").generation_config
    assert settings is not None
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (256, 256, 256)


def test_what_was_said_of_generation_stays_but_with_another_tokenizer(tmp_path: Path) -> None:
    settings = save(tmp_path / "start", "hf") / "generation_config.json"
    settings.write_text('{"eos_token_id": [7, 256]}')
    for way, to in (("start", "ours"), ("ours", "hf")):
        convert(tmp_path / way, tmp_path / to, to)
    assert (tmp_path / "hf" / settings.name).read_text() == settings.read_text()
    convert(tmp_path / "hf", tmp_path / "end", "hf", tokenizer=ByteTokenizer())
    assert json.loads((tmp_path / "end" / settings.name).read_text())["eos_token_id"] == 256


def test_a_tokenizer_takes_the_place_of_another_or_of_none(tmp_path: Path) -> None:
    LanguageModel(PLAIN).save_pretrained(tmp_path / "start")
    with pytest.raises(UserError, match="holds no tokenizer, which llama.cpp needs"):
        convert(tmp_path / "start", tmp_path / "model.gguf", "gguf")
    convert(tmp_path / "start", tmp_path / "model.gguf", "gguf", tokenizer=ByteTokenizer())
    (tmp_path / "start" / "special_tokens_map.json").write_text("{}")
    convert(tmp_path / "start", tmp_path / "end", "ours", tokenizer=ByteTokenizer())
    assert not (tmp_path / "end" / "special_tokens_map.json").exists(), "it was another tokenizer's"
    assert isinstance(load_tokenizer(tmp_path / "end"), ByteTokenizer)
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"


def test_a_target_that_is_taken_is_refused(tmp_path: Path) -> None:
    start = save(tmp_path / "start", "ours")
    with pytest.raises(FileProblem, match="there is something in .* already: choose a new folder"):
        convert(start, start, "hf")
    (tmp_path / "file").touch()
    with pytest.raises(FileProblem, match="there is something in .* already"):
        convert(start, tmp_path / "file", "hf")
    with pytest.raises(FileProblem, match="this is a folder, not a file"):
        convert(start, start, "gguf")
    (tmp_path / "empty").mkdir()
    convert(start, tmp_path / "empty", "hf")


@pytest.mark.parametrize("to", TARGETS)
def test_a_refusal_leaves_nothing(to: str, tmp_path: Path) -> None:
    model = LanguageModel(dataclasses.replace(PLAIN, pattern=(MambaConfig(ssm_norm=True),)))
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = 1e6
    model.save_pretrained(tmp_path / "start")
    ByteTokenizer().save(tmp_path / "start")
    expected = "holds values beyond what float16 can hold" if to == "ours" else "cannot express .*ssm_norm = True"
    with pytest.raises(UserError, match=expected):
        convert(tmp_path / "start", tmp_path / "end", to, dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="to must be one of 'ours', 'hf', 'state-spaces', 'gguf', got 'onnx'"):
        convert(tmp_path, tmp_path / "end", "onnx")


def test_a_failure_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    start = save(tmp_path / "start", "ours")
    monkeypatch.setattr("selective_ssm.interop.convert.shutil.copyfile", fail)
    with pytest.raises(FileProblem, match="the disk is full"):
        convert(start, tmp_path / "end", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["start"]
