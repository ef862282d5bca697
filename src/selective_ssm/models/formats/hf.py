"""The format of Hugging Face's MambaForCausalLM: its fields for the same config, its names for the same weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from selective_ssm.config import from_tagged, to_tagged
from selective_ssm.errors import UserError
from selective_ssm.layers import MambaConfig, S6Config
from selective_ssm.models.config import CONFIG_KINDS, LanguageModelConfig
from selective_ssm.models.formats.ours import without_tied_head

MODEL_TYPE = "mamba"

# our field -> theirs
_MODEL_FIELDS = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
    "residual_in_fp32": "residual_in_fp32",
}
_MIXER_FIELDS = {"expand": "expand", "d_conv": "conv_kernel", "conv_bias": "use_conv_bias", "bias": "use_bias"}
_SSM_FIELDS = {
    "d_state": "state_size",
    "dt_rank": "time_step_rank",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
}

# our name -> theirs
_TOP = {
    "embedding.weight": "backbone.embeddings.weight",
    "backbone.norm_f.weight": "backbone.norm_f.weight",
    "head.weight": "lm_head.weight",
}
_IN_LAYER = {
    "norm.weight": "norm.weight",
    "mixer.in_proj.weight": "mixer.in_proj.weight",
    "mixer.in_proj.bias": "mixer.in_proj.bias",
    "mixer.conv1d.weight": "mixer.conv1d.weight",
    "mixer.conv1d.bias": "mixer.conv1d.bias",
    "mixer.ssm.x_proj.weight": "mixer.x_proj.weight",
    "mixer.ssm.dt_proj.weight": "mixer.dt_proj.weight",
    "mixer.ssm.dt_bias": "mixer.dt_proj.bias",
    "mixer.ssm.A_log": "mixer.A_log",
    "mixer.ssm.D": "mixer.D",
    "mixer.out_proj.weight": "mixer.out_proj.weight",
    "mixer.out_proj.bias": "mixer.out_proj.bias",
}
_LAYER = re.compile(r"(backbone\.layers\.\d+\.)(.+)")
_CONV = "conv1d.weight"  # (D, K) here, (D, 1, K) there
_OF_TOKENS = ("embedding.weight", "head.weight")  # padded_vocab_size rows here, vocab_size there


def write_config(config: LanguageModelConfig) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        UserError: MambaForCausalLM cannot express this model; the sentence names the fields.
    """
    mixer = config.pattern[0]
    if len(set(config.layers)) > 1 or not isinstance(mixer, MambaConfig) or not isinstance(mixer.ssm, S6Config):
        raise UserError("MambaForCausalLM knows only a stack of equal Mamba blocks around S6, not this model's pattern")
    config = _as_theirs(config, mixer, mixer.ssm)
    tagged = to_tagged(config)
    (block,) = tagged["pattern"]
    written: dict[str, Any] = {"model_type": MODEL_TYPE, "architectures": ["MambaForCausalLM"], "hidden_act": "silu"}
    for ours, fields in ((tagged, _MODEL_FIELDS), (block, _MIXER_FIELDS), (block["ssm"], _SSM_FIELDS)):
        written |= {theirs: ours[name] for name, theirs in fields.items()}
    understood = dict(_leaves(to_tagged(read_config(written))))
    lost = [f"{place} = {value!r}" for place, value in _leaves(tagged) if understood[place] != value]
    if lost:
        raise UserError(f"MambaForCausalLM cannot express this model's {', '.join(lost)}")
    return written


def read_config(written: Mapping[str, Any]) -> LanguageModelConfig:
    """The config in config.json; a field left out has its value in transformers, which is the default here too.

    Raises:
        UserError: an activation other than SiLU, or a field of the wrong type.
    """
    if written.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act must be 'silu', got {written['hidden_act']!r}: no other activation is built")
    missing = [theirs for theirs in ("hidden_size", "num_hidden_layers", "vocab_size") if theirs not in written]
    if missing:
        raise UserError(f"'{missing[0]}' is missing, so this is not the config of a MambaForCausalLM")

    def renamed(fields: Mapping[str, str]) -> dict[str, Any]:
        return {name: written[theirs] for name, theirs in fields.items() if theirs in written}

    block = {"kind": "mamba", **renamed(_MIXER_FIELDS), "ssm": {"kind": "s6", **renamed(_SSM_FIELDS)}}
    model = {"kind": "language_model", **renamed(_MODEL_FIELDS), "pad_vocab_multiple": 1, "pattern": [block]}
    config = from_tagged(model, CONFIG_KINDS)
    assert isinstance(config, LanguageModelConfig)
    return config


def write_weights(weights: Mapping[str, Tensor], config: LanguageModelConfig) -> dict[str, Tensor]:
    """The tensors of the file, from a state dict; padding rows, which would be tokens there, are left out."""

    def as_theirs(name: str, tensor: Tensor) -> Tensor:
        if name in _OF_TOKENS:
            return tensor[: config.vocab_size]
        return tensor[:, None] if name.endswith(_CONV) else tensor

    return {_renamed(name, _TOP, _IN_LAYER): as_theirs(name, tensor) for name, tensor in weights.items()}


def read_weights(tensors: Mapping[str, Tensor], config: LanguageModelConfig) -> dict[str, Tensor]:
    """The state dict in the tensors of a file; names that are not theirs stay as they are.

    Raises:
        UserError: two names mean the same tensor, or a tied head differs from the embedding.
    """
    top, in_layer = ({theirs: ours for ours, theirs in names.items()} for names in (_TOP, _IN_LAYER))
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = _renamed(name, top, in_layer)
        if ours in weights:
            raise UserError(f"'{ours}' is there twice, once under each library's name")
        is_theirs = name.endswith(_CONV) and tensor.ndim == 3 and tensor.shape[1] == 1
        weights[ours] = tensor[:, 0] if is_theirs else tensor
    return without_tied_head(weights, config)


def _renamed(name: str, top: Mapping[str, str], in_layer: Mapping[str, str]) -> str:
    if match := _LAYER.fullmatch(name):
        layer, own = match.groups()
        return layer + in_layer.get(own, own)
    return top.get(name, name)


def _as_theirs(config: LanguageModelConfig, mixer: MambaConfig, ssm: S6Config) -> LanguageModelConfig:
    """The same model in their terms: no padding, the rank is a number, a real A is just A_log."""
    rank = math.ceil(config.d_model / 16) if ssm.dt_rank == "auto" else ssm.dt_rank
    a_init = "s4d_lin" if ssm.is_complex else "s4d_real"
    mixer = replace(mixer, ssm=replace(ssm, dt_rank=rank, a_init=a_init))
    return replace(config, pad_vocab_multiple=1, pattern=(mixer,))


def _leaves(tagged: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, object]]:
    """Every value of a tagged config with its dotted place; a pattern here has one entry."""
    for key, value in tagged.items():
        inner = value[0] if key == "pattern" else value
        if isinstance(inner, dict):
            yield from _leaves(inner, f"{place}{key}.")
        else:
            yield f"{place}{key}", value
