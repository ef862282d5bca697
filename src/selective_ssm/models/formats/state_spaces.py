"""The format of the package mamba_ssm, in which the released models are: no model_type, and a pickle of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.models.config import LanguageModelConfig
from selective_ssm.models.formats.ours import without_tied_head
from selective_ssm.models.formats.theirs import (
    Names,
    as_theirs,
    config_of,
    renamed,
    require_expressed,
    weights_as_ours,
    weights_as_theirs,
)

NAME = "state-spaces"
READER = "mamba_ssm's MambaLMHeadModel"
is_pickled = True

# our field -> theirs
_MODEL_FIELDS = {
    "d_model": "d_model",
    "n_layer": "n_layer",
    "vocab_size": "vocab_size",
    "residual_in_fp32": "residual_in_fp32",
    "pad_vocab_multiple": "pad_vocab_size_multiple",
    "tie_embeddings": "tie_embeddings",
}
_MIXER_FIELDS = {name: name for name in ("expand", "d_conv", "conv_bias", "bias")}
_SSM_FIELDS = {name: name for name in ("d_state", "dt_rank", "dt_min", "dt_max", "dt_init_floor")}
_OF_NO_CONSEQUENCE = ("layer", "dt_init", "dt_scale", "use_fast_path")
"""Fields of ssm_cfg that say how weights were drawn or how a layer is run, but for `layer`, which is looked at."""

_NAMES = Names(
    {
        "embedding.weight": "backbone.embedding.weight",
        "backbone.norm_f.weight": "backbone.norm_f.weight",
        "backbone.norm_f.bias": "backbone.norm_f.bias",
        "head.weight": "lm_head.weight",
    }
)


def describes(written: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format, which names itself nowhere."""
    return "model_type" not in written and {"d_model", "n_layer", "vocab_size"} <= written.keys()


def write_config(config: LanguageModelConfig) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        UserError: their class cannot express this model; the sentence names the fields.
    """
    model, block, ssm = as_theirs(config, READER, pads_vocabulary=True)
    written: dict[str, Any] = {theirs: model[name] for name, theirs in _MODEL_FIELDS.items()}
    written["ssm_cfg"] = {theirs: block[name] for name, theirs in _MIXER_FIELDS.items()}
    written["ssm_cfg"] |= {theirs: ssm[name] for name, theirs in _SSM_FIELDS.items()}
    written |= {"rms_norm": config.norm == "rms", "fused_add_norm": True}
    require_expressed(model, read_config(written), READER)
    return written


def read_config(written: Mapping[str, Any]) -> LanguageModelConfig:
    """The config in config.json; a field left out has its value there, which is the default here too.

    Raises:
        UserError: another kind of layer than Mamba's first, or a field of the wrong type.
    """
    blocks = written.get("ssm_cfg", {})
    if not isinstance(blocks, Mapping):
        raise UserError(f"ssm_cfg must be a mapping, got {blocks!r}")
    if (layer := blocks.get("layer", "Mamba1")) != "Mamba1":
        raise UserError(f"its layers are of the kind {layer!r}, which is not built here; 'Mamba1' is")
    for field, layers in (("attn_layer_idx", "attention"), ("d_intermediate", "MLPs")):
        if written.get(field):
            raise UserError(
                f"{field} must be empty, got {written[field]!r}: {layers} between Mamba layers are not read"
            )
    known = {*_MIXER_FIELDS.values(), *_SSM_FIELDS.values(), *_OF_NO_CONSEQUENCE}
    if unknown := sorted(blocks.keys() - known):
        raise UserError(f"ssm_cfg has the field '{unknown[0]}', which a layer of the kind 'Mamba1' has not")
    if not isinstance(rms := written.get("rms_norm", True), bool):
        raise UserError(f"rms_norm must be true or false, got {rms!r}")
    model = {"pad_vocab_multiple": 8, **renamed(written, _MODEL_FIELDS), "norm": "rms" if rms else "layer"}
    return config_of(model, renamed(blocks, _MIXER_FIELDS), renamed(blocks, _SSM_FIELDS))


def write_weights(weights: Mapping[str, Tensor], config: LanguageModelConfig) -> dict[str, Tensor]:
    """The tensors of the file, from a state dict; a tied head is there under its own name, in the same memory."""
    tied = {"head.weight": weights["embedding.weight"]} if config.tie_embeddings else {}
    return weights_as_theirs({**weights, **tied}, _NAMES)


def read_weights(tensors: Mapping[str, Tensor], config: LanguageModelConfig) -> dict[str, Tensor]:
    """The state dict in the tensors of a file; names that are not theirs stay as they are.

    Raises:
        UserError: two names mean the same tensor, or a tied head differs from the embedding.
    """
    return without_tied_head(weights_as_ours(tensors, _NAMES), config)
