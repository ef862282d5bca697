"""A MambaForCausalLM or FalconMambaForCausalLM and a LanguageModel turn into each other without loss."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconMambaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from selective_ssm.config import Config
from selective_ssm.errors import UserError
from selective_ssm.layers import MambaConfig as Block
from selective_ssm.layers import MLPConfig, S4DConfig, S6Config
from selective_ssm.models import LanguageModel, LanguageModelConfig
from tests.tolerance import assert_close_to_float64


class Case(NamedTuple):
    """A model of theirs; the numbers in no field are their defaults."""

    falcon: bool = False
    d_model: int = 16
    N: int = 8
    K: int = 4
    bias: bool = False
    conv_bias: bool = True
    rank: int | str = "auto"
    tied: bool = True
    others: tuple[tuple[str, object], ...] = ()

    def config(self) -> PreTrainedConfig:
        fields = {
            "hidden_size": self.d_model,
            "num_hidden_layers": 2,
            "vocab_size": 37,
            "state_size": self.N,
            "conv_kernel": self.K,
            "use_bias": self.bias,
            "use_conv_bias": self.conv_bias,
            "time_step_rank": self.rank,
            "tie_word_embeddings": self.tied,
        }
        return (FalconMambaConfig if self.falcon else MambaConfig)(**fields, **dict(self.others))

    @property
    def model_type(self) -> str:
        return "falcon_mamba" if self.falcon else "mamba"

    def build(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_config(self.config())
        with torch.no_grad():  # norms and biases start at one and zero: move them
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model.eval().to(dtype)


GRID = [
    Case(),
    Case(N=16, K=3, tied=False),
    Case(bias=True, conv_bias=False, rank=5),
    Case(d_model=24, N=16, bias=True, tied=False, others=(("expand", 3), ("layer_norm_epsilon", 1e-3))),
    Case(others=(("residual_in_fp32", False), ("intermediate_size", 48), ("expand", 16))),
    Case(falcon=True, tied=False),
    Case(falcon=True, N=16, K=3, bias=True, rank=3),
    Case(falcon=True, conv_bias=False, others=(("mixer_rms_eps", 1e-2),)),
]
every_case = pytest.mark.parametrize("case", GRID)

OURS = LanguageModelConfig(
    d_model=16, n_layer=2, vocab_size=45, pattern=(Block(bias=True, ssm=S6Config(d_state=4, a_init="random")),)
)
NORMED = dataclasses.replace(OURS, pattern=(Block(ssm=S6Config(d_state=4, norm_eps=1e-5)),))


@every_case
def test_the_same_logits(case: Case, tmp_path: Path) -> None:
    theirs = case.build()
    theirs.save_pretrained(tmp_path)
    ours = LanguageModel.from_pretrained(tmp_path)
    ids = torch.randint(ours.config.vocab_size, (2, 20))
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
        assert (ours(ids).logits - expected).abs().max() <= 2e-5 * expected.abs().max()
        last, _ = ours.prefill(ids)
    assert torch.equal(last.argmax(-1), expected[:, -1].argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [Case(), Case(falcon=True)])
def test_low_precision_is_as_good_as_theirs(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = case.build(dtype)
    theirs.save_pretrained(tmp_path)
    ours = LanguageModel.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    ids = torch.randint(ours.config.vocab_size, (2, 20))
    with torch.no_grad():
        exact = LanguageModel.from_pretrained(tmp_path, dtype=torch.float64)(ids).logits
        assert_close_to_float64(ours(ids).logits, theirs(ids, use_cache=False).logits, exact)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_keeps_every_bit_and_field(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = case.build(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    LanguageModel.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "back", model_type=case.model_type)
    assert_same_tensors(tmp_path / "theirs", tmp_path / "back")
    before, after = theirs.config, AutoConfig.from_pretrained(tmp_path / "back")
    assert type(after) is type(before)
    wrote = set(json.loads((tmp_path / "back" / "config.json").read_text()))
    assert {"state_size", "conv_kernel", "use_bias", "time_step_rank", "tie_word_embeddings"} <= wrote
    for field in wrote - {"architectures", "expand"}:
        assert getattr(after, field) == getattr(before, field), field
    assert after.intermediate_size == before.intermediate_size


def assert_same_tensors(one: Path, other: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
        assert after[key].dtype == tensor.dtype, key


@pytest.mark.parametrize(("config", "model_type"), [(OURS, "mamba"), (NORMED, "falcon_mamba")])
def test_ours_becomes_theirs(config: LanguageModelConfig, model_type: str, tmp_path: Path) -> None:
    ours = LanguageModel(config)
    ours.save_pretrained(tmp_path, model_type=model_type)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(45, (1, 12))
    with torch.no_grad():
        expected = ours(ids).logits
        actual = theirs(ids, use_cache=False).logits
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_padding_rows_do_not_become_tokens(tied: bool, tmp_path: Path) -> None:
    ours = LanguageModel(dataclasses.replace(OURS, tie_embeddings=tied))
    ours.save_pretrained(tmp_path, model_type="mamba")
    again = LanguageModel.from_pretrained(tmp_path)
    assert again.config.vocab_size == again.config.padded_vocab_size == 45
    weights = again.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(weights[name], tensor[:45] if name in ("embedding.weight", "head.weight") else tensor), name


def with_ssm(**switches: object) -> tuple[Block]:
    return (Block(ssm=S6Config(**switches)),)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pattern": (MLPConfig(),)}, "only a stack of equal Mamba blocks"),
        ({"pattern": (Block(), MLPConfig())}, "only a stack of equal Mamba blocks"),
        ({"pattern": (Block(ssm=S4DConfig()),)}, "only a stack of equal Mamba blocks"),
        ({"pattern": (Block(ssm_norm=True),)}, "pattern.ssm_norm = True"),
        ({"pattern": with_ssm(discretization="zoh")}, "pattern.ssm.discretization = 'zoh'"),
        ({"pattern": with_ssm(a_init="s4d_lin")}, "pattern.ssm.a_init = 's4d_lin'"),
        (
            {"pattern": with_ssm(norm_eps=1e-6)},
            "MambaForCausalLM cannot express this model's pattern.ssm.norm_eps = 1e-06",
        ),
        ({"pattern": with_ssm(selective_B=False, skip=False)}, "pattern.ssm.skip = False, pattern.ssm.selective_B"),
        ({"norm": "layer", "max_positions": 9}, "norm = 'layer', max_positions = 9"),
    ],
)
def test_what_they_cannot_express_is_named(changes: dict[str, Config], sentence: str, tmp_path: Path) -> None:
    config = dataclasses.replace(OURS, **changes)
    with pytest.raises(UserError, match=sentence):
        LanguageModel(config).save_pretrained(tmp_path, model_type="mamba")
    assert list(tmp_path.iterdir()) == []


def test_falcon_has_norms_always(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"FalconMambaForCausalLM cannot express this model's pattern.ssm.norm_eps = None"
    ):
        LanguageModel(OURS).save_pretrained(tmp_path, model_type="falcon_mamba")


def test_fields_left_out_have_their_values_there(tmp_path: Path) -> None:
    Case(falcon=True, others=(("mixer_rms_eps", 1e-6),)).build().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    expected = LanguageModel.from_pretrained(tmp_path).config
    for absent in ({"mixer_rms_eps": None, "expand": None}, {}):
        kept = {key: value for key, value in written.items() if key not in ("mixer_rms_eps", "expand")}
        (tmp_path / "config.json").write_text(json.dumps(kept | absent))
        assert LanguageModel.from_pretrained(tmp_path).config == expected


def test_the_embedding_may_have_its_old_name(tmp_path: Path) -> None:
    theirs = Case().build()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    embedding = LanguageModel.from_pretrained(tmp_path).state_dict()["embedding.weight"]
    assert torch.equal(embedding, theirs.get_input_embeddings().weight)


def test_pickles_of_theirs_are_read_and_say_the_head_twice(tmp_path: Path) -> None:
    theirs = Case().build()
    theirs.save_pretrained(tmp_path)
    expected = LanguageModel.from_pretrained(tmp_path).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    found = LanguageModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_width_that_is_no_multiple_is_refused(tmp_path: Path) -> None:
    Case().build().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"intermediate_size": 40}))
    with pytest.raises(UserError, match="intermediate_size must be a multiple of hidden_size = 16, got 40"):
        LanguageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backbone.layers.0.mixer.conv1d.weight": torch.zeros(32)}, r"conv1d.weight' has the shape \(32,\)"),
        (
            {"backbone.layers.0.mixer.ssm.A_log": torch.zeros(32, 4)},
            "'backbone.layers.0.mixer.ssm.A_log' is there twice",
        ),
    ],
)
def test_weights_that_are_not_theirs_are_refused(
    changes: dict[str, torch.Tensor], sentence: str, tmp_path: Path
) -> None:
    LanguageModel(OURS).save_pretrained(tmp_path, model_type="mamba")
    save_file(load_file(tmp_path / "model.safetensors") | changes, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=sentence) as refusal:
        LanguageModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(refusal.value)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="model_type must be one of 'selective_ssm', 'mamba', 'falcon_mamba', 'state-spaces', got"
    ):
        LanguageModel(OURS).save_pretrained(tmp_path, model_type="mamba2")
