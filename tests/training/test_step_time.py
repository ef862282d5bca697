"""Training does not slow down: numbers too small to be normal cost a processor a hundred times as much."""

from __future__ import annotations

import copy
import statistics
import time

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from selective_ssm.data import Batch, DataConfig, TextBatches
from selective_ssm.layers import MambaConfig, S6Config
from selective_ssm.models import LanguageModel, LanguageModelConfig
from selective_ssm.tasks import next_token_loss
from selective_ssm.training.optimizer import OptimizerConfig, adamw

SMALL = LanguageModelConfig(d_model=64, n_layer=2, vocab_size=257, pattern=(MambaConfig(ssm=S6Config(d_state=8)),))


def train_on(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """One step of training; the processor's seconds that it took."""
    began = time.process_time()
    optimizer.zero_grad()
    next_token_loss(model(batch.ids).logits, batch.targets).backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return time.process_time() - began


@pytest.mark.slow
def test_a_step_after_a_thousand_takes_at_most_a_tenth_longer_than_at_the_start() -> None:
    """Timed in turns, so that whatever else the machine does meets both alike."""
    batches = TextBatches(DataConfig(source="python_stdlib", row_length=256, batch_size=2))
    settings = OptimizerConfig(lr=3e-3)
    young = LanguageModel(SMALL)
    trained = copy.deepcopy(young)
    optimizers = {model: adamw(model, settings, fused=True) for model in (young, trained)}
    for step in range(1000):
        train_on(trained, optimizers[trained], batches[step])
    seconds: dict[nn.Module, list[float]] = {young: [], trained: []}
    for step in range(1000, 1060):
        for model, optimizer in optimizers.items():
            seconds[model].append(train_on(model, optimizer, batches[step]))
    ratio = statistics.median(seconds[trained]) / statistics.median(seconds[young])
    assert ratio <= 1.1, f"a step takes {ratio:.2f} times as long after 1,000 steps"
