"""Checkpoints of mamba_ssm are read as they are, written as it reads them, and never run.

What the format is, is written out here anew: its fields, its names, and what they mean for a sequence.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.layers import MambaConfig, MLPConfig, S4DConfig, S6Config
from selective_ssm.models import LanguageModel, LanguageModelConfig

RELEASED = {  # the fields of state-spaces/mamba-130m, of a smaller size
    "d_model": 16,
    "n_layer": 2,
    "vocab_size": 37,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
EVERY_FIELD = {
    "d_model": 24,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": 40,
    "ssm_cfg": {
        "layer": "Mamba1",
        "d_state": 8,
        "d_conv": 3,
        "expand": 3,
        "dt_rank": 5,
        "dt_min": 0.01,
        "dt_max": 0.2,
        "dt_init": "constant",
        "dt_scale": 2.0,
        "dt_init_floor": 1e-3,
        "conv_bias": False,
        "bias": True,
        "use_fast_path": False,
    },
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": False,
    "residual_in_fp32": False,
    "fused_add_norm": False,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": False,
}
every_config = pytest.mark.parametrize("config", [RELEASED, EVERY_FIELD], ids=["released", "every field"])


def draw(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights as MambaLMHeadModel names and shapes them."""
    ssm, width = config["ssm_cfg"], config["d_model"]
    inner, N, K = ssm.get("expand", 2) * width, ssm.get("d_state", 16), ssm.get("d_conv", 4)
    rank = ssm.get("dt_rank", math.ceil(width / 16))
    multiple = config["pad_vocab_size_multiple"]
    rows = -(-config["vocab_size"] // multiple) * multiple
    shapes: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (rows, width)}
    norm = {"weight": (width,)} if config["rms_norm"] else {"weight": (width,), "bias": (width,)}
    for layer in range(config["n_layer"]):
        mixer = {
            "A_log": (inner, N),
            "D": (inner,),
            "in_proj.weight": (2 * inner, width),
            "conv1d.weight": (inner, 1, K),
            "x_proj.weight": (rank + 2 * N, inner),
            "dt_proj.weight": (inner, rank),
            "dt_proj.bias": (inner,),
            "out_proj.weight": (width, inner),
        }
        if ssm.get("conv_bias", True):
            mixer["conv1d.bias"] = (inner,)
        if ssm.get("bias", False):
            mixer |= {"in_proj.bias": (2 * inner,), "out_proj.bias": (width,)}
        prefix = f"backbone.layers.{layer}"
        shapes |= {f"{prefix}.mixer.{name}": shape for name, shape in mixer.items()}
        shapes |= {f"{prefix}.norm.{name}": shape for name, shape in norm.items()}
    shapes |= {f"backbone.norm_f.{name}": shape for name, shape in norm.items()}
    tensors = {name: torch.randn(shape).div(3).to(dtype) for name, shape in shapes.items()}
    tied = config.get("tie_embeddings", True)
    return tensors | {"lm_head.weight": tensors["backbone.embedding.weight"] if tied else torch.randn(rows, width) / 3}


def logits_of(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """What MambaLMHeadModel answers to ids (L,): one token after the other, in float64."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(name: str, x: Tensor) -> Tensor:
        if not config["rms_norm"]:
            return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)
        return weights[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def mixer(name: str, x: Tensor) -> Tensor:
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        u, z = F.linear(x, own["in_proj.weight"], own.get("in_proj.bias")).chunk(2, dim=-1)
        K = own["conv1d.weight"].shape[-1]
        taps = F.pad(u.T, (K - 1, 0)).unfold(-1, K, 1)  # (channels, L, K)
        u = F.silu(torch.einsum("dlk,dk->ld", taps, own["conv1d.weight"][:, 0]) + own.get("conv1d.bias", 0))
        A, N = -own["A_log"].exp(), own["A_log"].shape[1]
        rank = own["dt_proj.weight"].shape[1]
        low_rank, B, C = F.linear(u, own["x_proj.weight"]).split([rank, N, N], dim=-1)
        delta = F.softplus(F.linear(low_rank, own["dt_proj.weight"], own["dt_proj.bias"]))
        h, ys = torch.zeros_like(A), []
        for u_t, delta_t, B_t, C_t in zip(u, delta, B, C, strict=True):
            h = (delta_t[:, None] * A).exp() * h + (delta_t * u_t)[:, None] * B_t
            ys.append(h @ C_t + own["D"] * u_t)
        return F.linear(torch.stack(ys) * F.silu(z), own["out_proj.weight"], own.get("out_proj.bias"))

    x = weights["backbone.embedding.weight"][ids]
    for layer in range(config["n_layer"]):
        prefix = f"backbone.layers.{layer}"
        x = x + mixer(f"{prefix}.mixer", norm(f"{prefix}.norm", x))
    return norm("backbone.norm_f", x) @ weights["lm_head.weight"].T


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


@every_config
def test_the_answers_of_the_description(config: dict[str, Any], tmp_path: Path) -> None:
    tensors = draw(config)
    model = LanguageModel.from_pretrained(write(tmp_path, config, tensors), dtype=torch.float64)
    ids = torch.randint(config["vocab_size"], (20,))
    expected = logits_of(config, tensors, ids)[:, : config["vocab_size"]]
    actual = model(ids[None]).logits[0]
    assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max()


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_keeps_every_bit_and_field(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = draw(config, dtype)
    model = LanguageModel.from_pretrained(write(tmp_path / "theirs", config, tensors))
    model.save_pretrained(tmp_path / "ours")
    again = LanguageModel.from_pretrained(tmp_path / "ours")
    again.save_pretrained(tmp_path / "back", model_type="state-spaces")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].dtype == tensor.dtype, name
    same = back["lm_head.weight"].data_ptr() == back["backbone.embedding.weight"].data_ptr()
    assert same == config.get("tie_embeddings", True), "a tied head is stored once"
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "model_type" not in written
    for field in RELEASED.keys() - {"ssm_cfg", "fused_add_norm"}:
        assert written[field] == config[field], field
    kept = config["ssm_cfg"].keys() - {"layer", "dt_init", "dt_scale", "use_fast_path"}
    assert {field: written["ssm_cfg"][field] for field in kept} == {field: config["ssm_cfg"][field] for field in kept}


def test_pickled_shards_are_read(tmp_path: Path) -> None:
    tensors = draw(RELEASED)
    write(tmp_path, RELEASED, {})
    (tmp_path / "pytorch_model.bin").unlink()
    names = list(tensors)
    places = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(names)}
    for shard in set(places.values()):
        torch.save({name: tensors[name] for name in names if places[name] == shard}, tmp_path / shard)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    loaded = LanguageModel.from_pretrained(tmp_path).state_dict()
    assert torch.equal(loaded["backbone.layers.1.mixer.ssm.D"], tensors["backbone.layers.1.mixer.D"])


def test_a_pickle_takes_the_place_of_safetensors_and_back(tmp_path: Path) -> None:
    model = LanguageModel.from_pretrained(write(tmp_path, RELEASED, draw(RELEASED)))
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    model.save_pretrained(tmp_path, model_type="state-spaces")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "pytorch_model.bin"]
    assert LanguageModel.from_pretrained(tmp_path).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "its layers are of the kind 'Mamba2', which is not built here"),
        ({"ssm_cfg": {"headdim": 64}}, "ssm_cfg has the field 'headdim'"),
        ({"ssm_cfg": [1]}, "ssm_cfg must be a mapping"),
        ({"ssm_cfg": {"d_state": "many"}}, "d_state must be int"),
        ({"attn_layer_idx": [1]}, "attention between Mamba layers"),
        ({"d_intermediate": 32}, "MLPs between Mamba layers"),
        ({"rms_norm": "yes"}, "rms_norm must be true or false"),
        ({"d_model": "wide"}, "d_model must be int"),
    ],
)
def test_configs_that_are_not_understood_are_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write(tmp_path, {**RELEASED, **changes}, {})
    with pytest.raises(UserError, match=sentence) as refusal:
        LanguageModel.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(refusal.value)


def with_ssm(**switches: Any) -> tuple[MambaConfig]:
    return (MambaConfig(ssm=S6Config(**switches)),)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pattern": (MambaConfig(), MLPConfig())}, "knows only a stack of equal Mamba blocks"),
        ({"pattern": (MambaConfig(ssm=S4DConfig()),)}, "knows only a stack of equal Mamba blocks"),
        ({"pattern": with_ssm(discretization="zoh")}, "pattern.ssm.discretization = 'zoh'"),
        ({"pattern": with_ssm(norm_eps=1e-6)}, "pattern.ssm.norm_eps = 1e-06"),
        ({"norm_eps": 1e-6, "max_positions": 9}, "norm_eps = 1e-06, max_positions = 9"),
    ],
)
def test_what_they_cannot_express_is_named(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    config = dataclasses.replace(LanguageModelConfig(d_model=16, n_layer=2, vocab_size=37), **changes)
    with pytest.raises(UserError, match=sentence):
        LanguageModel(config).save_pretrained(tmp_path, model_type="state-spaces")
    assert list(tmp_path.iterdir()) == []
