"""What the formats of other libraries share: a stack of equal Mamba blocks, the names within one, what gets lost."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from selective_ssm.config import from_tagged, to_tagged
from selective_ssm.errors import UserError
from selective_ssm.layers import MambaConfig, S6Config
from selective_ssm.models.config import CONFIG_KINDS, LanguageModelConfig

OF_TOKENS = ("embedding.weight", "head.weight")
"""They have padded_vocab_size rows."""

# our name -> theirs
_IN_LAYER = {
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
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
_IN_LAYER_TO_OURS = {theirs: ours for ours, theirs in _IN_LAYER.items()}
_LAYER = re.compile(r"(backbone\.layers\.\d+\.)(.+)")
_CONV = "conv1d.weight"  # (D, K) here, (D, 1, K) there


@dataclass(frozen=True)
class Names:
    """A format's names of tensors: those outside of the layers differ, ours -> theirs; those inside are the same."""

    top: Mapping[str, str]

    def theirs(self, name: str) -> str:
        """Their name for one of ours."""
        return _renamed(name, self.top, _IN_LAYER)

    def ours(self, name: str) -> str:
        """Our name for one of theirs; what is none stays as it is."""
        return _renamed(name, self._to_ours, _IN_LAYER_TO_OURS)

    @cached_property
    def _to_ours(self) -> dict[str, str]:
        return {theirs: ours for ours, theirs in self.top.items()}


def _renamed(name: str, top: Mapping[str, str], in_layer: Mapping[str, str]) -> str:
    if match := _LAYER.fullmatch(name):
        layer, own = match.groups()
        return layer + in_layer.get(own, own)
    return top.get(name, name)


def weights_as_theirs(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """A state dict under their names and in their shapes; views, nothing is copied."""
    return {names.theirs(name): tensor[:, None] if name.endswith(_CONV) else tensor for name, tensor in weights.items()}


def weights_as_ours(tensors: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The state dict in their tensors, a tied head still among them; views, nothing is copied.

    Raises:
        UserError: two names mean the same tensor.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = names.ours(name)
        if ours in weights:
            raise UserError(f"'{ours}' is there twice, once under each library's name")
        is_theirs = name.endswith(_CONV) and tensor.ndim == 3 and tensor.shape[1] == 1
        weights[ours] = tensor[:, 0] if is_theirs else tensor
    return weights


def as_theirs(
    config: LanguageModelConfig, reader: str, *, pads_vocabulary: bool
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The tagged config, that of its one block, and that of the block's SSM, in the terms of other libraries.

    The rank of Δ is a number there, a real A just A_log, and not every one has an embedding with rows for no token.

    Raises:
        UserError: the model is no stack of equal Mamba blocks around S6.
    """
    mixer = config.pattern[0]
    if len(set(config.layers)) > 1 or not isinstance(mixer, MambaConfig) or not isinstance(mixer.ssm, S6Config):
        raise UserError(f"{reader} knows only a stack of equal Mamba blocks around S6, not this model's pattern")
    ssm = mixer.ssm
    rank = math.ceil(config.d_model / 16) if ssm.dt_rank == "auto" else ssm.dt_rank
    a_init = "s4d_lin" if ssm.is_complex else "s4d_real"
    mixer = replace(mixer, ssm=replace(ssm, dt_rank=rank, a_init=a_init))
    multiple = config.pad_vocab_multiple if pads_vocabulary else 1
    tagged = to_tagged(replace(config, pad_vocab_multiple=multiple, pattern=(mixer,)))
    (block,) = tagged["pattern"]
    return tagged, block, block["ssm"]


def require_expressed(tagged: Mapping[str, Any], understood: LanguageModelConfig, reader: str) -> None:
    """Refuse a model, tagged by `as_theirs`, of which a reader of what was written would make another.

    Raises:
        UserError: it would; the sentence names the fields that got lost.
    """
    found = dict(_leaves(to_tagged(understood)))
    lost = [f"{place} = {value!r}" for place, value in _leaves(tagged) if found[place] != value]
    if lost:
        raise UserError(f"{reader} cannot express this model's {', '.join(lost)}")


def _leaves(tagged: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, object]]:
    """Every value of a tagged config with its dotted place; a pattern here has one entry."""
    for key, value in tagged.items():
        inner = value[0] if key == "pattern" else value
        if isinstance(inner, dict):
            yield from _leaves(inner, f"{place}{key}.")
        else:
            yield f"{place}{key}", value


def renamed(written: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """Our fields from theirs, those that are there."""
    return {ours: written[theirs] for ours, theirs in fields.items() if theirs in written}


def config_of(model: Mapping[str, Any], block: Mapping[str, Any], ssm: Mapping[str, Any]) -> LanguageModelConfig:
    """The config of a stack of equal Mamba blocks around S6, from our fields of each.

    Raises:
        UserError: a field of the wrong type, or a value that is refused.
    """
    whole = {"kind": "mamba", **block, "ssm": {"kind": "s6", **ssm}}
    config = from_tagged({"kind": "language_model", **model, "pattern": [whole]}, CONFIG_KINDS)
    assert isinstance(config, LanguageModelConfig)
    return config
