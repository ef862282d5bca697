"""Checkpoints are folders that come back unchanged, or are refused in one sentence."""

from __future__ import annotations

import json
import operator
from functools import reduce
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from selective_ssm.errors import FileProblem, UserError
from selective_ssm.layers import MambaConfig, MLPConfig, S4DConfig, S6Config
from selective_ssm.models import LanguageModel, LanguageModelConfig, checkpoint

TIED = LanguageModelConfig(d_model=8, n_layer=2, vocab_size=11, pattern=(MambaConfig(ssm=S6Config(d_state=4)),))
UNTIED = LanguageModelConfig(
    d_model=8,
    n_layer=2,
    vocab_size=11,
    pattern=(MambaConfig(ssm=S4DConfig(d_state=4)), MLPConfig(multiple_of=8)),
    tie_embeddings=False,
    max_positions=16,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LanguageModel(TIED).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite the weights with some of them replaced, added, or (None) left out; "__" stands for a dot."""
    weights = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, folder / "model.safetensors")


def assert_same_models(one: LanguageModel, other: LanguageModel) -> None:
    assert one.config == other.config
    weights = other.state_dict()
    assert list(one.state_dict()) == list(weights)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_comes_back_bit_for_bit(config: LanguageModelConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    model = LanguageModel(config).to(dtype)
    model.save_pretrained(tmp_path / "new" / "model")
    loaded = LanguageModel.from_pretrained(tmp_path / "new" / "model")
    assert_same_models(loaded, model)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    ids = torch.randint(11, (1, 5))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_model_comes_back_in_another_dtype(folder: Path) -> None:
    loaded = LanguageModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_the_folder_holds_what_is_promised(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    written = json.loads((folder / "config.json").read_text())
    assert (written["model_type"], written["format"]) == ("selective_ssm", 1)
    assert written["config"]["pattern"][0]["ssm"]["kind"] == "s6"
    assert "embedding.weight" in load_file(folder / "model.safetensors")
    assert "head.weight" not in load_file(folder / "model.safetensors")


def test_what_other_tools_add_beside_the_config_is_ignored(folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"transformers_version": "5", "architectures": ["X"]}))
    (folder / "tokenizer_config.json").write_text("{}")
    assert LanguageModel.from_pretrained(folder).config == TIED


def test_shards_and_their_index(tmp_path: Path) -> None:
    model = LanguageModel(UNTIED)
    checkpoint.save(tmp_path, UNTIED, model.state_dict(), "selective_ssm", shard_bytes=2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / shard).values()) for shard in shards]
    assert max(sizes) <= 2000
    assert index["metadata"]["total_size"] == sum(sizes) == sum(p.nbytes for p in model.parameters())
    assert_same_models(LanguageModel.from_pretrained(tmp_path), model)


def test_a_model_takes_the_place_of_another_whole(tmp_path: Path) -> None:
    first, second = LanguageModel(UNTIED), LanguageModel(TIED)
    checkpoint.save(tmp_path, UNTIED, first.state_dict(), "selective_ssm", shard_bytes=2000)
    second.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert_same_models(LanguageModel.from_pretrained(tmp_path), second)
    checkpoint.save(tmp_path, UNTIED, first.state_dict(), "selective_ssm", shard_bytes=2000)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_models(LanguageModel.from_pretrained(tmp_path), first)


def test_a_head_equal_to_the_embedding_is_accepted(folder: Path) -> None:
    embedding = load_file(folder / "model.safetensors")["embedding.weight"]
    change_weights(folder, head__weight=embedding.clone())
    assert LanguageModel.from_pretrained(folder).head is None
    change_weights(folder, head__weight=embedding + 1)
    with pytest.raises(UserError, match="the file's head differs from its embedding"):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"embedding__weight": torch.full((16, 8), torch.nan)}, "'embedding.weight' holds NaN or infinite values"),
        ({"embedding__weight": torch.zeros(16, 9)}, r"has the shape \(16, 9\), expected \(16, 8\)"),
        ({"embedding__weight": torch.zeros(16, 8, dtype=torch.int64)}, "holds torch.int64"),
        ({"embedding__weight": torch.zeros(16, 8).to(torch.float8_e4m3fn)}, "holds torch.float8_e4m3fn"),
        ({"embedding__weight": None}, "'embedding.weight' is missing"),
        ({"backbone__extra": torch.zeros(1)}, "'backbone.extra' is not part of the model"),
        ({f"extra{n}": torch.zeros(1) for n in range(5)}, r"'extra2' \(and 2 more\) is not part"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    folder: Path, changes: dict[str, torch.Tensor | None], sentence: str
) -> None:
    change_weights(folder, **changes)
    with pytest.raises(UserError, match=sentence):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize("length", [0, 4, 300, -1])
def test_truncated_weights_are_refused(folder: Path, length: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:length])
    with pytest.raises(FileProblem, match="model.safetensors"):
        LanguageModel.from_pretrained(folder)


def test_a_pickle_in_place_of_the_weights_is_not_run(folder: Path) -> None:
    torch.save({"embedding.weight": torch.zeros(16, 8)}, folder / "model.safetensors")
    with pytest.raises(FileProblem, match="truncated or foreign"):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is empty"),
        ('{"model_type": "selective_ssm", "form', "not valid JSON"),
        ("[1]", "model_type must be one of 'selective_ssm', 'mamba', 'falcon_mamba'"),
        ('{"model_type": "llama"}', "model_type must be one of 'selective_ssm', 'mamba', 'falcon_mamba'"),
        ('{"model_type": ["mamba"]}', "model_type must be one of 'selective_ssm', 'mamba', 'falcon_mamba'"),
        ('{"model_type": "selective_ssm", "format": 2, "config": {}}', "format must be 1, got 2"),
        ('{"model_type": "selective_ssm", "format": 1}', "must be a mapping"),
        ('{"model_type": "selective_ssm", "format": 1, "config": {"kind": "mlp"}}', "kind 'language_model', got 'mlp'"),
        ('{"model_type": "mamba"}', "'hidden_size' is missing"),
        (
            '{"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": "many"}',
            "vocab_size must be",
        ),
        ('{"model_type": "mamba", "hidden_act": "gelu"}', "hidden_act must be 'silu'"),
    ],
)
def test_configs_that_are_not_understood_are_refused(folder: Path, content: str, sentence: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=sentence) as refusal:
        LanguageModel.from_pretrained(folder)
    assert "config.json" in str(refusal.value)


def test_an_unknown_key_of_the_config_is_refused_by_its_place(folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text())
    written["config"]["pattern"][0]["ssm"]["d_stat"] = 4
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"pattern\[0\].ssm: unknown key 'd_stat' \(did you mean 'd_state'\?\)"):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (("d_model",), 10**12, "beyond what a tensor can have"),
        (("d_model",), 10**20, "beyond what a tensor can have"),
        (("vocab_size",), 10**20, "beyond what a tensor can have"),
        (("n_layer",), 10**12, "tensors cannot be 1000000000000 layers"),
        (("pattern", 0, "ssm", "dt_rank"), 17, "dt_rank must be at most the 16 channels"),
    ],
)
def test_models_that_cannot_be_built_are_refused(
    folder: Path, place: tuple[str | int, ...], value: int, sentence: str
) -> None:
    written = json.loads((folder / "config.json").read_text())
    *outer, last = place
    reduce(operator.getitem, outer, written["config"])[last] = value
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=sentence) as refusal:
        LanguageModel.from_pretrained(folder)
    assert str(folder) in str(refusal.value)


def test_folders_that_are_no_checkpoints_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match="there is no such file or folder"):
        LanguageModel.from_pretrained(tmp_path / "absent")
    with pytest.raises(FileProblem, match="is a file, not a folder"):
        LanguageModel.from_pretrained(folder / "config.json")
    with pytest.raises(FileProblem, match="is not a checkpoint: it has no config.json"):
        LanguageModel.from_pretrained(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileProblem, match="neither model.safetensors nor model.safetensors.index.json"):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {"embedding.weight": "../model.safetensors"}}'])
def test_an_index_that_is_none_is_refused(folder: Path, index: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FileProblem, match="weight_map must name files"):
        LanguageModel.from_pretrained(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, TIED, LanguageModel(TIED).state_dict(), "selective_ssm", shard_bytes=2000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileProblem, match=f"{shard.name}.*no such file"):
        LanguageModel.from_pretrained(tmp_path)
