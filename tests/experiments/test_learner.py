"""A step of a learner is one of AdamW, and a captured one is as good as any."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from selective_ssm.experiments.cell import CellConfig
from selective_ssm.experiments.learner import Learner
from selective_ssm.models import LanguageModel
from selective_ssm.tasks import generator_of, next_token_loss
from selective_ssm.training.optimizer import parameter_groups
from tests.experiments.conftest import TINY, needs_gpu

RATE = 1e-2
FACTORS = (0.5, 1.0, 0.25, 0.75, 0.1, 0.0)


def learned(
    cell: CellConfig, device: torch.device, factors: tuple[float, ...] = FACTORS
) -> tuple[Learner, list[Tensor]]:
    torch.manual_seed(0)
    learner = Learner(cell, RATE, device)
    losses = [
        learner.learn(cell.task.draw(cell.batch_size, generator_of(0, device, step=step)), factor)
        for step, factor in enumerate(factors)
    ]
    return learner, losses


def test_steps_are_those_of_adamw() -> None:
    learner, losses = learned(TINY, torch.device("cpu"))
    torch.manual_seed(0)
    model = LanguageModel(TINY.model)
    settings = replace(TINY.optimizer, lr=RATE)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), betas=settings.betas, eps=settings.eps)
    for step, factor in enumerate(FACTORS):
        ids, targets, _ = TINY.task.draw(TINY.batch_size, generator_of(0, "cpu", step=step))
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.zero_grad()
        loss = next_token_loss(model(ids).logits, targets)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch.testing.assert_close(losses[step], loss.detach())
    for mine, expected in zip(learner.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_rate_of_nothing_changes_nothing() -> None:
    learner, _ = learned(TINY, torch.device("cpu"), factors=(0.0, 0.0))
    torch.manual_seed(0)
    for mine, first in zip(learner.model.parameters(), LanguageModel(TINY.model).parameters(), strict=True):
        assert mine.equal(first)


@needs_gpu
def test_branches_compute_in_the_precision_of_the_cell() -> None:
    losses = [learned(replace(TINY, precision=name), torch.device("cuda"))[1] for name in ("fp32", "bf16")]
    assert all(one.isfinite() for one in losses[1])
    assert [float(loss) for loss in losses[0]] != [float(loss) for loss in losses[1]]


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_steps_are_as_good_as_others(
    precision: Literal["fp32", "bf16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = replace(TINY, precision=precision)
    learner, losses = learned(cell, torch.device("cuda"))
    monkeypatch.setattr("selective_ssm.experiments.learner._EAGER_STEPS", len(FACTORS))
    other, expected = learned(cell, torch.device("cuda"))
    assert [float(loss) for loss in losses] == [float(loss) for loss in expected]
    for mine, others in zip(learner.model.parameters(), other.model.parameters(), strict=True):
        assert mine.equal(others)
