"""A small model and its optimizer, step by step; on a GPU a step is one CUDA graph: launches take longer than work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from selective_ssm.data.loader import Batch
from selective_ssm.experiments.cell import CellConfig
from selective_ssm.models import LanguageModel
from selective_ssm.tasks import next_token_loss
from selective_ssm.training.optimizer import adamw

_Step = Callable[[Tensor, Tensor], Tensor]

_EAGER_STEPS = 3
"""Steps before one is captured: they compile kernels, and make the optimizer's moments."""


class Learner:
    """What the runs of a cell train.

    Args:
        cell: what is learned, by what.
        learning_rate: its peak.
        device: where. On a GPU branches and head compute in the cell's precision, elsewhere in fp32.

    Attributes:
        model: the model.
    """

    def __init__(self, cell: CellConfig, learning_rate: float, device: torch.device) -> None:
        self._cell, self._device = cell, device
        self.model = LanguageModel(cell.model).to(device)
        settings = replace(cell.optimizer, lr=learning_rate)
        self._optimizer = adamw(self.model, settings, fused=settings.fused, capturable=device.type == "cuda")
        self._peaks = torch.tensor([group["peak_lr"] for group in self._optimizer.param_groups], device=device)
        self._rates = torch.empty_like(self._peaks)
        self._share_rates()
        self._captured = _Captured(device) if device.type == "cuda" else None

    def _share_rates(self) -> None:
        """Let the optimizer read learning rates from one tensor, as a graph reads only what stays where it is."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    @property
    def moments(self) -> dict[int, dict[str, Tensor]]:
        """What the optimizer knows of each parameter."""
        return self._optimizer.state_dict()["state"]

    @moments.setter
    def moments(self, moments: dict[int, dict[str, Tensor]]) -> None:
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})
        self._share_rates()
        if self._captured is not None:  # what is captured writes to the moments that were there
            self._captured = _Captured(self._device)

    def precision(self) -> AbstractContextManager[Any]:
        """Within it, the model computes as it does in training."""
        is_bf16 = self._cell.precision == "bf16" and self._device.type == "cuda"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=is_bf16)

    def learn(self, batch: Batch, factor: float) -> Tensor:
        """Take one step.

        Args:
            batch: what to learn from, of the same shape at each step.
            factor: the share of their peaks that learning rates have.

        Returns:
            The loss before the step, in nats an answer.
        """
        torch.mul(self._peaks, factor, out=self._rates)
        if self._captured is None:
            return self._step(batch.ids, batch.targets)
        return self._captured.take(self._step, batch.ids, batch.targets)

    def _step(self, ids: Tensor, targets: Tensor) -> Tensor:
        self._optimizer.zero_grad()
        due = self._cell.task.due
        with self.precision():
            hidden, _ = self.model.hidden(ids)
            logits = self.model.logits(hidden[:, due])
        loss = next_token_loss(logits, targets[:, due])
        loss.backward()
        if self._cell.optimizer.clip is not None:
            clip_grad_norm_(self.model.parameters(), self._cell.optimizer.clip)
        self._optimizer.step()
        return loss.detach()


class _Captured:
    """A step on a GPU: the first ones as they are written, the others by one launch.

    All are on one stream, since gradients are added up on that of the first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._eager_steps = _EAGER_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None

    def take(self, step: _Step, ids: Tensor, targets: Tensor) -> Tensor:
        """Take a step, the same each time, and return its loss."""
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            loss = self._taken(step, ids, targets)
        outside.wait_stream(self._stream)
        return loss

    def _taken(self, step: _Step, ids: Tensor, targets: Tensor) -> Tensor:
        if self._eager_steps:
            self._eager_steps -= 1
            return step(ids, targets)
        if self._graph is None:
            self._ids, self._targets = ids.clone(), targets.clone()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._loss = step(self._ids, self._targets)
        assert ids.shape == self._ids.shape
        self._ids.copy_(ids)
        self._targets.copy_(targets)
        self._graph.replay()
        return self._loss.clone()
