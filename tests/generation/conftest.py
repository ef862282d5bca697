"""A small language model with a byte tokenizer's vocabulary."""

from __future__ import annotations

import pytest
import torch

from selective_ssm.layers import MambaConfig, MLPConfig
from selective_ssm.models import LanguageModel, LanguageModelConfig


@pytest.fixture
def model() -> LanguageModel:
    """Untrained, in float64, with a head large enough for the next token to be anything but even."""
    pattern = (MambaConfig(), MLPConfig())
    config = LanguageModelConfig(d_model=16, n_layer=3, vocab_size=257, pattern=pattern, tie_embeddings=False)
    made = LanguageModel(config).double().eval()
    assert made.head is not None
    torch.nn.init.normal_(made.head.weight)
    torch.nn.init.normal_(made.embedding.weight)
    return made
