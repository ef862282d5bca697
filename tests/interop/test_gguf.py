"""What a GGUF file says of a model: every number of it, under the names that llama.cpp looks for."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from selective_ssm.data import ByteTokenizer
from selective_ssm.errors import MissingPackage, UserError
from selective_ssm.interop.gguf import write_gguf
from selective_ssm.layers import MambaConfig, MLPConfig, S4DConfig, S6Config
from selective_ssm.models import LanguageModel, LanguageModelConfig

PLAIN = LanguageModelConfig(d_model=16, n_layer=2, vocab_size=257, pattern=(MambaConfig(ssm=S6Config(d_state=4)),))


def with_ssm(**switches: Any) -> LanguageModelConfig:
    return dataclasses.replace(PLAIN, pattern=(MambaConfig(ssm=S6Config(d_state=4, **switches)),))


def export(config: LanguageModelConfig, folder: Path, dtype: torch.dtype | None = None) -> tuple[LanguageModel, Path]:
    model = LanguageModel(config)
    write_gguf(model, folder / "model.gguf", ByteTokenizer(), dtype=dtype)
    return model, folder / "model.gguf"


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Each tensor of a file in its own dtype."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found: dict[str, torch.Tensor] = {}
    for one in GGUFReader(path).tensors:
        shape = tuple(int(size) for size in reversed(one.shape))
        found[one.name] = torch.from_numpy(np.array(one.data)).view(dtypes[one.tensor_type.name]).reshape(shape)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_weight_is_there(dtype: torch.dtype, tmp_path: Path) -> None:
    model, path = export(PLAIN, tmp_path, dtype)
    weights, found = model.state_dict(), tensors(path)
    assert len(found) == 2 + 10 * 2
    assert torch.equal(found["token_embd.weight"], weights["embedding.weight"][:257].to(dtype))
    assert torch.equal(found["output_norm.weight"], weights["backbone.norm_f.weight"])
    mixer = {
        "ssm_in.weight": "in_proj.weight",
        "ssm_x.weight": "ssm.x_proj.weight",
        "ssm_dt.weight": "ssm.dt_proj.weight",
        "ssm_out.weight": "out_proj.weight",
    }
    for theirs, ours in mixer.items():
        assert torch.equal(found[f"blk.1.{theirs}"], weights[f"backbone.layers.1.mixer.{ours}"].to(dtype)), ours
    single = {
        "ssm_conv1d.weight": "conv1d.weight",
        "ssm_conv1d.bias": "conv1d.bias",
        "ssm_dt.bias": "ssm.dt_bias",
        "ssm_d": "ssm.D",
    }
    for theirs, ours in single.items():
        assert torch.equal(found[f"blk.1.{theirs}"], weights[f"backbone.layers.1.mixer.{ours}"]), ours
    assert torch.equal(found["blk.1.attn_norm.weight"], weights["backbone.layers.1.norm.weight"])
    assert torch.equal(found["blk.1.ssm_a"], -torch.exp(weights["backbone.layers.1.mixer.ssm.A_log"]))


def test_what_is_said_of_the_model(tmp_path: Path) -> None:
    said = fields(export(PLAIN, tmp_path)[1])
    expected = {
        "general.architecture": "mamba",
        "general.name": "model",
        "general.file_type": 0,
        "mamba.vocab_size": 257,
        "mamba.embedding_length": 16,
        "mamba.block_count": 2,
        "mamba.ssm.conv_kernel": 4,
        "mamba.ssm.inner_size": 32,
        "mamba.ssm.state_size": 4,
        "mamba.ssm.time_step_rank": 1,
        "mamba.ssm.dt_b_c_rms": False,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {name: said[name] for name in expected} == expected
    assert said["mamba.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_what_is_absent_is_zero(tmp_path: Path) -> None:
    block = MambaConfig(conv_bias=False, ssm=S6Config(d_state=4, skip=False))
    found = tensors(export(dataclasses.replace(PLAIN, pattern=(block,)), tmp_path)[1])
    for name in ("blk.0.ssm_conv1d.bias", "blk.0.ssm_d"):
        assert torch.equal(found[name], torch.zeros(32))


def test_a_head_of_its_own_is_written(tmp_path: Path) -> None:
    model, path = export(dataclasses.replace(PLAIN, tie_embeddings=False), tmp_path)
    assert torch.equal(tensors(path)["output.weight"], model.state_dict()["head.weight"][:257])


def test_norms_of_b_c_and_delta_are_told(tmp_path: Path) -> None:
    assert fields(export(with_ssm(norm_eps=1e-5), tmp_path)[1])["mamba.ssm.dt_b_c_rms"] is True


@pytest.mark.parametrize(("own", "written"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float64, "F32")])
def test_without_a_dtype_that_of_the_embedding_is_taken(own: torch.dtype, written: str, tmp_path: Path) -> None:
    write_gguf(LanguageModel(PLAIN).to(own), tmp_path / "model.gguf", ByteTokenizer())
    kinds = {one.name: one.tensor_type.name for one in GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["blk.0.ssm_in.weight"] == written
    assert kinds["blk.0.ssm_a"] == kinds["blk.0.ssm_d"] == kinds["blk.0.ssm_conv1d.weight"] == "F32"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pattern": (MambaConfig(), MLPConfig())}, "llama.cpp knows only a stack of equal Mamba blocks"),
        ({"pattern": (MambaConfig(ssm=S4DConfig()),)}, "llama.cpp knows only a stack of equal Mamba blocks"),
        ({"pattern": (MambaConfig(bias=True),)}, "llama.cpp cannot express this model's pattern.bias = True$"),
        ({"pattern": (MambaConfig(expand=3),)}, "pattern.expand = 3$"),
        ({"pattern": (MambaConfig(ssm_norm=True),)}, "pattern.ssm_norm = True$"),
        ({"pattern": with_ssm(discretization="zoh").pattern}, "pattern.ssm.discretization = 'zoh'$"),
        ({"pattern": with_ssm(a_init="s4d_lin").pattern}, "pattern.ssm.a_init = 's4d_lin'$"),
        ({"pattern": with_ssm(selective_delta=False).pattern}, "pattern.ssm.selective_delta = False$"),
        ({"pattern": with_ssm(selective_B=False).pattern}, "pattern.ssm.selective_B = False$"),
        ({"pattern": with_ssm(selective_C=False).pattern}, "pattern.ssm.selective_C = False$"),
        (
            {"pattern": with_ssm(norm_eps=1e-6).pattern},
            "one eps for all norms, but this model .* norm_eps = 1e-05 and B, C and Δ with 1e-06$",
        ),
        ({"norm": "layer"}, "norm = 'layer'$"),
        ({"max_positions": 99}, "max_positions = 99$"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        export(dataclasses.replace(PLAIN, **changes), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_values_that_do_not_fit_leave_no_file(tmp_path: Path) -> None:
    model = LanguageModel(PLAIN)
    with torch.no_grad():
        model.embedding.weight[0, 0] = 1e6
    with pytest.raises(UserError, match="'token_embd.weight' holds values beyond what float16 can hold"):
        write_gguf(model, tmp_path / "model.gguf", ByteTokenizer(), dtype=torch.float16)
    with pytest.raises(UserError, match="dtype must be"):
        write_gguf(model, tmp_path / "model.gguf", ByteTokenizer(), dtype=torch.int8)
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackage, match=r"pip install 'selective-ssm\[gguf\]'"):
        export(PLAIN, tmp_path)
