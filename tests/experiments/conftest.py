"""A cell that is learned in a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from selective_ssm.experiments.cell import CellConfig
from selective_ssm.experiments.grid import Cell
from selective_ssm.models import LanguageModelConfig
from selective_ssm.ops import nvrtc
from selective_ssm.tasks import InductionHeads
from selective_ssm.training import OptimizerConfig, ScheduleConfig

needs_gpu = pytest.mark.skipif(nvrtc.explain() is not None, reason=str(nvrtc.explain()))

TINY = CellConfig(
    model=LanguageModelConfig(d_model=8, n_layer=1, vocab_size=8),
    task=InductionHeads(length=8, vocab_size=4),
    steps=6,
    batch_size=4,
    optimizer=OptimizerConfig(weight_decay=0.0),
    schedule=ScheduleConfig(warmup_steps=2),
    learning_rates=(1e-2, 1e-3),
    seeds=2,
    test_rows=8,
    test_lengths=(16,),
    far_length=64,
    far_rows=2,
    paper=100.0,
)


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    return Cell("tiny", TINY, tmp_path / "runs" / "tiny")
