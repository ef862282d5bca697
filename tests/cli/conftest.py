"""Checkpoints to run the command line on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from selective_ssm.data import ByteTokenizer
from selective_ssm.models import LanguageModel, LanguageModelConfig


@pytest.fixture(scope="session")
def ids_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model over bytes, without a tokenizer."""
    folder = tmp_path_factory.mktemp("ids")
    torch.manual_seed(0)
    LanguageModel(LanguageModelConfig(d_model=16, n_layer=2, vocab_size=257)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(ids_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    LanguageModel.from_pretrained(ids_checkpoint).save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder
