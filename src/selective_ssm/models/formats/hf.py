"""The formats of Hugging Face's MambaForCausalLM and FalconMambaForCausalLM: their fields, their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.layers import MambaConfig, S6Config
from selective_ssm.models.config import LanguageModelConfig
from selective_ssm.models.formats.ours import without_tied_head
from selective_ssm.models.formats.theirs import (
    OF_TOKENS,
    Names,
    as_theirs,
    config_of,
    renamed,
    require_expressed,
    weights_as_ours,
    weights_as_theirs,
)

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

_NAMES = Names(
    {
        "embedding.weight": "backbone.embeddings.weight",
        "backbone.norm_f.weight": "backbone.norm_f.weight",
        "head.weight": "lm_head.weight",
    }
)
_OLD_NAMES = {"backbone.embedding.weight": "backbone.embeddings.weight"}  # which transformers still takes


@dataclass(frozen=True)
class HuggingFace:
    """The format of one of their classes.

    Args:
        model_type: what their config.json calls it.
        architecture: the class's name.
        ssm_fields: fields of the inner SSM that this class has and others have not, ours -> theirs.
        ssm_defaults: values of those in transformers where a config.json leaves them out.
        is_pickled: whether its weights are written as ``torch.save`` does; they are read either way.
    """

    model_type: str
    architecture: str
    ssm_fields: Mapping[str, str] = field(default_factory=dict)
    ssm_defaults: Mapping[str, Any] = field(default_factory=dict)
    is_pickled: bool = False

    def write_config(self, config: LanguageModelConfig) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            UserError: their class cannot express this model; the sentence names the fields.
        """
        model, block, ssm = as_theirs(config, self.architecture, pads_vocabulary=False)
        written: dict[str, Any] = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "hidden_act": "silu",
        }
        for ours, fields in ((model, _MODEL_FIELDS), (block, _MIXER_FIELDS), (ssm, {**_SSM_FIELDS, **self.ssm_fields})):
            written |= {theirs: ours[name] for name, theirs in fields.items()}
        require_expressed(model, self.read_config(written), self.architecture)
        return written

    def read_config(self, written: Mapping[str, Any]) -> LanguageModelConfig:
        """The config in config.json; a field left out, or null, has its value in transformers.

        Raises:
            UserError: an activation other than SiLU, or a field of the wrong type.
        """
        known = {name: value for name, value in written.items() if value is not None}
        if known.get("hidden_act", "silu") != "silu":
            raise UserError(f"hidden_act must be 'silu', got {known['hidden_act']!r}: no other activation is built")
        missing = [theirs for theirs in ("hidden_size", "num_hidden_layers", "vocab_size") if theirs not in known]
        if missing:
            raise UserError(f"'{missing[0]}' is missing, so this is not the config of a {self.architecture}")
        block = renamed(known, _MIXER_FIELDS)
        if (width := known.get("intermediate_size")) is not None:  # it goes before expand there
            block["expand"] = _expansion(width, known["hidden_size"])
        ssm = {**self.ssm_defaults, **renamed(known, {**_SSM_FIELDS, **self.ssm_fields})}
        return config_of(renamed(known, _MODEL_FIELDS) | {"pad_vocab_multiple": 1}, block, ssm)

    def write_weights(self, weights: Mapping[str, Tensor], config: LanguageModelConfig) -> dict[str, Tensor]:
        """The tensors of the file, from a state dict; padding rows, which would be tokens there, are left out."""
        tokens = config.vocab_size
        trimmed = {name: tensor[:tokens] if name in OF_TOKENS else tensor for name, tensor in weights.items()}
        return weights_as_theirs(trimmed, _NAMES)

    def read_weights(self, tensors: Mapping[str, Tensor], config: LanguageModelConfig) -> dict[str, Tensor]:
        """The state dict in the tensors of a file; names that are not theirs stay as they are.

        Raises:
            UserError: two names mean the same tensor, or a tied head differs from the embedding.
        """
        current = {_OLD_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
        return without_tied_head(weights_as_ours(current, _NAMES), config)


def _expansion(width: object, d_model: object) -> object:
    """The width of a block as a multiple of the model's; what is no number is left to be refused by its type."""
    if not isinstance(width, int) or not isinstance(d_model, int) or d_model <= 0:
        return width
    if width % d_model:
        raise UserError(f"intermediate_size must be a multiple of hidden_size = {d_model}, got {width}")
    return width // d_model


MAMBA = HuggingFace("mamba", "MambaForCausalLM")
FALCON_MAMBA = HuggingFace(
    "falcon_mamba", "FalconMambaForCausalLM", {"norm_eps": "mixer_rms_eps"}, ssm_defaults={"norm_eps": 1e-6}
)


def class_for(config: LanguageModelConfig) -> HuggingFace:
    """The class of theirs that a model is nearest to, which need not be able to express it."""
    blocks = [mixer.ssm for mixer in config.layers if isinstance(mixer, MambaConfig)]
    is_normed = any(isinstance(ssm, S6Config) and ssm.norm_eps is not None for ssm in blocks)
    return FALCON_MAMBA if is_normed else MAMBA
