"""A small language model with a byte tokenizer's vocabulary."""

from __future__ import annotations

import pytest

from selective_ssm.models import LanguageModel
from tests.generation.oracle import untrained_model


@pytest.fixture
def model() -> LanguageModel:
    """Untrained, in float64."""
    return untrained_model()
