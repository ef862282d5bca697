"""Tokens on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selective_ssm.generation.job import Job


class Flight:
    """What one step gave for some texts. The host waits for it only when it looks.

    Args:
        jobs: the texts, in the order of the rows.
        tokens: (B,), B at least the number of texts; the rest is padding.
        logprobs: (B,), where some text wants them.
    """

    def __init__(self, jobs: Sequence[Job], tokens: Tensor, logprobs: Tensor | None) -> None:
        self.jobs = jobs
        self._tokens = tokens.to("cpu", non_blocking=True)
        self._logprobs = None if logprobs is None else logprobs.to("cpu", non_blocking=True)
        self._landed = torch.cuda.Event() if tokens.is_cuda else None
        if self._landed is not None:
            self._landed.record()

    def land(self) -> tuple[list[int], list[float] | None]:
        """Wait for the tokens and their log-probabilities."""
        if self._landed is not None:
            self._landed.synchronize()
        return self._tokens.tolist(), None if self._logprobs is None else self._logprobs.tolist()
