"""A MambaForCausalLM and a LanguageModel turn into each other without loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaForCausalLM
from transformers import MambaConfig as TheirConfig

from selective_ssm.config import Config
from selective_ssm.errors import UserError
from selective_ssm.layers import MambaConfig, MLPConfig, S4DConfig, S6Config
from selective_ssm.models import LanguageModel, LanguageModelConfig

THEIRS = {
    "tied": TheirConfig(hidden_size=16, num_hidden_layers=3, vocab_size=50, state_size=4),
    "untied": TheirConfig(
        hidden_size=24,
        num_hidden_layers=2,
        vocab_size=37,
        state_size=8,
        expand=3,
        conv_kernel=3,
        use_bias=True,
        use_conv_bias=False,
        time_step_rank=5,
        tie_word_embeddings=False,
        layer_norm_epsilon=1e-3,
        residual_in_fp32=False,
    ),
}
every_config = pytest.mark.parametrize("name", THEIRS)

OURS = LanguageModelConfig(
    d_model=16, n_layer=2, vocab_size=45, pattern=(MambaConfig(bias=True, ssm=S6Config(d_state=4, a_init="random")),)
)


def their_model(name: str) -> MambaForCausalLM:
    model = MambaForCausalLM(THEIRS[name])
    with torch.no_grad():  # norms and biases start at one and zero: move them
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@every_config
def test_the_same_logits(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    ours = LanguageModel.from_pretrained(tmp_path)
    ids = torch.randint(ours.config.vocab_size, (2, 20))
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
        assert (ours(ids).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
        last, _ = ours.prefill(ids)
    assert torch.equal(last.argmax(-1), expected[:, -1].argmax(-1))


@every_config
def test_a_round_trip_keeps_every_bit_and_field(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    LanguageModel.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "back", model_type="mamba")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    for field in ("hidden_size", "state_size", "expand", "conv_kernel", "use_bias", "use_conv_bias", "time_step_rank"):
        assert getattr(loaded.config, field) == getattr(THEIRS[name], field)
    assert loaded.config.layer_norm_epsilon == THEIRS[name].layer_norm_epsilon
    assert loaded.config.tie_word_embeddings == THEIRS[name].tie_word_embeddings


def test_ours_becomes_theirs(tmp_path: Path) -> None:
    ours = LanguageModel(OURS)
    ours.save_pretrained(tmp_path, model_type="mamba")
    theirs = MambaForCausalLM.from_pretrained(tmp_path).eval()
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


def with_ssm(**switches: object) -> tuple[MambaConfig]:
    return (MambaConfig(ssm=S6Config(**switches)),)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pattern": (MLPConfig(),)}, "only a stack of equal Mamba blocks"),
        ({"pattern": (MambaConfig(), MLPConfig())}, "only a stack of equal Mamba blocks"),
        ({"pattern": (MambaConfig(ssm=S4DConfig()),)}, "only a stack of equal Mamba blocks"),
        ({"pattern": (MambaConfig(ssm_norm=True),)}, "pattern.ssm_norm = True"),
        ({"pattern": with_ssm(discretization="zoh")}, "pattern.ssm.discretization = 'zoh'"),
        ({"pattern": with_ssm(a_init="s4d_lin")}, "pattern.ssm.a_init = 's4d_lin'"),
        ({"pattern": with_ssm(selective_B=False, skip=False)}, "pattern.ssm.skip = False, pattern.ssm.selective_B"),
        ({"norm": "layer", "max_positions": 9}, "norm = 'layer', max_positions = 9"),
    ],
)
def test_what_they_cannot_express_is_named(changes: dict[str, Config], sentence: str, tmp_path: Path) -> None:
    config = dataclasses.replace(OURS, **changes)
    with pytest.raises(UserError, match=sentence):
        LanguageModel(config).save_pretrained(tmp_path, model_type="mamba")
    assert list(tmp_path.iterdir()) == []


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
    with pytest.raises(UserError, match="model_type must be one of 'selective_ssm', 'mamba', got 'mamba2'"):
        LanguageModel(OURS).save_pretrained(tmp_path, model_type="mamba2")
