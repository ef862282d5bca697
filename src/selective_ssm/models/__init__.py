"""Whole models: the language model, its config, state and presets."""

from selective_ssm.models.config import CONFIG_KINDS, LanguageModelConfig
from selective_ssm.models.language import LanguageModel, LanguageModelOutput
from selective_ssm.models.presets import PRESETS, preset
from selective_ssm.models.state import ModelState

__all__ = [
    "CONFIG_KINDS",
    "PRESETS",
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelOutput",
    "ModelState",
    "preset",
]
