"""File formats of a language model: config fields and weight names as plain data, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from selective_ssm.models.config import LanguageModelConfig
from selective_ssm.models.formats import hf, ours


class Format(Protocol):
    """What every format of this folder offers; a refusal is a `UserError` that says what does not fit."""

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


FORMATS: dict[str, Format] = {ours.MODEL_TYPE: ours, **{one.model_type: one for one in (hf.MAMBA, hf.FALCON_MAMBA)}}
"""The format of each ``model_type`` that a config.json may name."""
