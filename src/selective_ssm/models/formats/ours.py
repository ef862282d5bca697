"""This library's own format: the tagged config, and the weights under the names of the modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from selective_ssm.config import from_tagged, to_tagged
from selective_ssm.errors import UserError
from selective_ssm.models.config import CONFIG_KINDS, LanguageModelConfig

MODEL_TYPE = "selective_ssm"
VERSION = 1
is_pickled = False


def write_config(config: LanguageModelConfig) -> dict[str, Any]:
    """The content of config.json."""
    return {"model_type": MODEL_TYPE, "format": VERSION, "config": to_tagged(config)}


def read_config(written: Mapping[str, Any]) -> LanguageModelConfig:
    """The config in config.json, whose other keys, which other tools may add, are ignored.

    Raises:
        UserError: the format is of a later version, or the config is not exactly understood.
    """
    if written.get("format") != VERSION:
        raise UserError(f"format must be {VERSION}, got {written.get('format')!r}; a newer selective-ssm may read it")
    config = from_tagged(written.get("config"), CONFIG_KINDS)
    if not isinstance(config, LanguageModelConfig):
        raise UserError(f"config must be of the kind '{LanguageModelConfig.kind}', got '{config.kind}'")
    return config


def write_weights(weights: Mapping[str, Tensor], config: LanguageModelConfig) -> dict[str, Tensor]:
    """The tensors of the file: those of the state dict, in which a tied head has no name of its own."""
    return dict(weights)


def read_weights(tensors: Mapping[str, Tensor], config: LanguageModelConfig) -> dict[str, Tensor]:
    """The state dict in the tensors of a file."""
    return without_tied_head(tensors, config)


def without_tied_head(weights: Mapping[str, Tensor], config: LanguageModelConfig) -> dict[str, Tensor]:
    """Drop a head that a tied model repeats.

    Raises:
        UserError: the head differs from the embedding.
    """
    kept = dict(weights)
    if config.tie_embeddings and "head.weight" in kept:
        head, embedding = kept.pop("head.weight"), kept.get("embedding.weight")
        if embedding is not None and not torch.equal(head, embedding):
            raise UserError("the config ties the head to the embedding, but the file's head differs from its embedding")
    return kept
