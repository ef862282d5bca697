"""File formats of a language model: config fields and weight names as plain data, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.models.config import LanguageModelConfig
from selective_ssm.models.formats import hf, ours, state_spaces


class Format(Protocol):
    """What every format of this folder offers; a refusal is a `UserError` that says what does not fit."""

    @property
    def is_pickled(self) -> bool:
        """Whether its readers want the weights as ``torch.save`` writes them."""
        ...

    def write_config(self, config: LanguageModelConfig) -> dict[str, Any]:
        """The content of config.json."""
        ...

    def read_config(self, written: Mapping[str, Any]) -> LanguageModelConfig:
        """The config in the content of a config.json."""
        ...

    def write_weights(self, weights: Mapping[str, Tensor], config: LanguageModelConfig) -> dict[str, Tensor]:
        """The tensors of the file, from a state dict."""
        ...

    def read_weights(self, tensors: Mapping[str, Tensor], config: LanguageModelConfig) -> dict[str, Tensor]:
        """The state dict in the tensors of a file."""
        ...


_BY_MODEL_TYPE: dict[str, Format] = {
    ours.MODEL_TYPE: ours,
    hf.MAMBA.model_type: hf.MAMBA,
    hf.FALCON_MAMBA.model_type: hf.FALCON_MAMBA,
}
FORMATS: dict[str, Format] = {**_BY_MODEL_TYPE, state_spaces.NAME: state_spaces}
"""Every format by its name, which is the ``model_type`` of its config.json where that has one."""


def format_of(written: object) -> Format:
    """The format of the content of a config.json.

    Raises:
        UserError: it is of none.
    """
    if isinstance(written, Mapping) and state_spaces.describes(written):
        return state_spaces
    model_type = written.get("model_type") if isinstance(written, Mapping) else None
    if isinstance(model_type, str) and model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type]
    known = ", ".join(f"'{name}'" for name in _BY_MODEL_TYPE)
    raise UserError(
        f"it describes no model this library reads: its model_type must be one of {known}, or it must be mamba_ssm's "
        "config of d_model, n_layer and vocab_size, which has none"
    )
