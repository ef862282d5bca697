"""That the tasks can be learned: a Mamba finds induction heads on a processor, and at lengths that it never saw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selective_ssm.experiments.cell import Run
from selective_ssm.experiments.run import go_on, result_of
from selective_ssm.models import LanguageModelConfig
from selective_ssm.tasks import InductionHeads
from tests.experiments.conftest import TINY


@pytest.mark.slow
def test_induction_is_learned_and_holds_at_longer_lengths(tmp_path: Path) -> None:
    cell = replace(
        TINY,
        model=LanguageModelConfig(d_model=64, n_layer=2, vocab_size=16),
        task=InductionHeads(length=32, vocab_size=16),
        steps=1000,
        batch_size=64,
        schedule=replace(TINY.schedule, warmup_steps=100),
        test_rows=256,
        test_lengths=(64, 256),
    )
    assert go_on(cell, Run(1e-3, 0), tmp_path, torch.device("cpu"), until=lambda: False)
    result = result_of(tmp_path)
    assert result is not None
    shares = {length: test["tokens"]["right"] / 256 for length, test in result["tests"].items()}
    assert shares["32"] >= 0.99
    assert shares["256"] >= 0.9
