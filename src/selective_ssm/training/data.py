"""The batches of a run, continued where it stopped."""

from __future__ import annotations

import itertools
import signal
import sys
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from selective_ssm.data import Batch, TextBatches
from selective_ssm.errors import UserError

SECONDS_TO_OUTLIVE = 30
"""How long a worker goes on after SIGTERM; the run has ended it by then, unless the run itself is gone."""


class ResumableBatches(LightningDataModule):
    """Hands out the batches that training has not consumed yet, whatever the workers had prepared ahead.

    Args:
        batches: the data, a function of the batch's number.
        workers: processes that prepare batches ahead; 0 prepares them here.
    """

    def __init__(self, batches: TextBatches, *, workers: int) -> None:
        super().__init__()
        self.batches = batches
        self._workers = workers
        self._consumed = 0

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(
            self.batches,
            batch_size=None,
            sampler=itertools.count(self._consumed),
            num_workers=self._workers,
            persistent_workers=self._workers > 0,  # those are the ones that Lightning ends when a step fails
            worker_init_fn=_outlive_signals_to_the_group,
            generator=torch.Generator(),  # one of its own: drawing from the global one would move it at a resume
        )

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"consumed": self.trainer.fit_loop.total_batch_idx + 1, "identity": self.batches.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["identity"] != self.batches.identity:
            raise UserError(
                "the data is not what this run began with (its text, its tokenizer or its settings have changed), so "
                "it cannot go on: restore the data, or choose another output folder"
            )
        self._consumed = state_dict["consumed"]


def _outlive_signals_to_the_group(worker: int) -> None:
    """Keep a signal that the whole process group gets from taking the workers from under the step being finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_TO_OUTLIVE))
