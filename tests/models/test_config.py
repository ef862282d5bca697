"""The model's config, and the released sizes."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest
import torch

from selective_ssm.config import from_tagged, to_tagged
from selective_ssm.errors import UserError
from selective_ssm.layers import MambaConfig, MLPConfig, S4DConfig
from selective_ssm.models import CONFIG_KINDS, PRESETS, LanguageModel, LanguageModelConfig, preset

HYBRID = LanguageModelConfig(
    d_model=8,
    n_layer=5,
    vocab_size=11,
    pattern=(MambaConfig(), MLPConfig(multiple_of=8), MambaConfig(ssm=S4DConfig(d_state=4))),
    norm="layer",
    tie_embeddings=False,
    max_positions=32,
)


def test_the_pattern_is_repeated() -> None:
    assert [layer.kind for layer in HYBRID.layers] == ["mamba", "mlp", "mamba", "mamba", "mlp"]


@pytest.mark.parametrize("config", [HYBRID, *PRESETS.values()])
def test_a_config_survives_json_and_pickle(config: LanguageModelConfig) -> None:
    assert from_tagged(json.loads(json.dumps(to_tagged(config))), CONFIG_KINDS) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_wrong_key_is_named_with_its_place() -> None:
    tagged = to_tagged(HYBRID)
    tagged["pattern"][0]["ssm"]["d_stat"] = 3
    with pytest.raises(UserError, match=r"pattern\[0\].ssm: unknown key 'd_stat' \(did you mean 'd_state'\?\)"):
        from_tagged(tagged, CONFIG_KINDS)


@pytest.mark.parametrize(("vocab_size", "multiple", "padded"), [(50277, 8, 50280), (50280, 8, 50280), (257, 1, 257)])
def test_the_vocabulary_is_padded(vocab_size: int, multiple: int, padded: int) -> None:
    config = LanguageModelConfig(d_model=8, n_layer=1, vocab_size=vocab_size, pad_vocab_multiple=multiple)
    assert config.padded_vocab_size == padded


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("n_layer", 0, "language_model: n_layer must be greater than 0, got 0"),
        ("max_positions", -1, "max_positions must be greater than 0"),
        ("norm", "rmss", "did you mean 'rms'"),
        ("pattern", (), "pattern must hold at least one"),
        ("pattern", MambaConfig(), "pattern must be a tuple of mixers' configs, got MambaConfig"),
        ("pattern", ["mamba"], "pattern must be a tuple of mixers' configs, got .'mamba'"),
    ],
)
def test_impossible_models_are_refused(field: str, value: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        LanguageModelConfig(**({"d_model": 8, "n_layer": 1, "vocab_size": 11} | {field: value}))


def test_a_list_of_mixers_is_as_good_as_a_tuple() -> None:
    mixers = [MambaConfig(), MLPConfig()]
    config = LanguageModelConfig(d_model=8, n_layer=1, vocab_size=11, pattern=mixers)  # pyright: ignore[reportArgumentType]
    assert config.pattern == tuple(mixers)
    assert from_tagged(to_tagged(config), CONFIG_KINDS) == config


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("mamba-130m", 129_135_360),
        ("mamba-370m", 371_516_416),
        ("mamba-790m", 793_204_224),
        ("mamba-1.4b", 1_372_178_432),
        ("mamba-2.8b", 2_768_345_600),
    ],
)
def test_the_presets_have_the_released_numbers_of_parameters(name: str, total: int) -> None:
    with torch.device("meta"):
        parts = LanguageModel(preset(name)).num_parameters()
    assert sum(parts.values()) == total
    assert set(parts) == {"embedding", "mamba", "norms"}


@pytest.mark.parametrize(
    ("name", "plain", "plus"),
    [
        ("125m", 125_243_904, 123_568_896),
        ("350m", 355_895_296, 359_818_240),
        ("760m", 760_335_360, 756_782_592),
        ("1.3b", 1_315_770_368, 1_317_324_800),
    ],
)
def test_the_transformers_have_the_sizes_they_are_called_by(name: str, plain: int, plus: int) -> None:
    for kind, total, parts in (
        ("transformer", plain, {"embedding", "positions", "attention", "mlp", "norms"}),
        ("transformer++", plus, {"embedding", "attention", "mlp", "norms"}),
    ):
        counts = LanguageModel.outline(preset(f"{kind}-{name}")).num_parameters()
        assert sum(counts.values()) == total
        assert set(counts) == parts


def test_the_smallest_transformer_is_gpt_2_but_for_vocabulary_and_positions() -> None:
    theirs = replace(preset("transformer-125m"), vocab_size=50257, pad_vocab_multiple=1, max_positions=1024)
    assert sum(LanguageModel.outline(theirs).num_parameters().values()) == 124_439_808  # as released


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'mamba-130m'"):
        preset("mamba-130M")
