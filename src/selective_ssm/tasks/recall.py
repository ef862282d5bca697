"""How much of what was asked for was said: by token, and by whole sequence.

Legend: B rows, L length, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from selective_ssm.data.loader import IGNORE


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many of all were right.

    Args:
        right: how many.
        all: of how many.

    Example:
        >>> share = Share(right=990, all=1000)
        >>> share.value, [round(bound, 4) for bound in share.interval]
        (0.99, [0.9817, 0.9946])
    """

    right: int
    all: int

    @property
    def value(self) -> float:
        """The share; NaN of nothing."""
        return self.right / self.all if self.all else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, which is of use near 0 and 1 too (Wilson, 1927)."""
        if not self.all:
            return 0.0, 1.0
        z, n, p = 1.959963984540054, self.all, self.value
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))

    def __add__(self, other: Share) -> Share:
        return Share(right=self.right + other.right, all=self.all + other.all)


@dataclass(frozen=True, kw_only=True)
class Recall:
    """How much of what was asked for a model has said.

    Args:
        tokens: answers.
        sequences: rows with all answers right.
    """

    tokens: Share
    sequences: Share

    def __add__(self, other: Recall) -> Recall:
        return Recall(tokens=self.tokens + other.tokens, sequences=self.sequences + other.sequences)


def recall(logits: Tensor, targets: Tensor) -> Recall:
    """Compare the likeliest tokens with the answers that are due.

    Args:
        logits: (B, L, V); where some are no numbers nothing was said, and so nothing right.
        targets: (B, L), -100 where no answer is due. A row in which none is due counts as no sequence.

    Example:
        >>> import torch
        >>> logits = torch.eye(3)[torch.tensor([[0, 1], [2, 2]])]
        >>> found = recall(logits, torch.tensor([[0, 2], [-100, 2]]))
        >>> found.tokens, found.sequences
        (Share(right=2, all=3), Share(right=1, all=2))
    """
    is_due = targets != IGNORE
    is_right = (logits.argmax(-1) == targets) & ~logits.isnan().any(-1)
    asked = is_due.any(1)
    whole = (is_right | ~is_due).all(1) & asked
    counts = (is_right & is_due).sum(), is_due.sum(), whole.sum(), asked.sum()
    right, due, sequences, rows = (int(count) for count in counts)
    return Recall(tokens=Share(right=right, all=due), sequences=Share(right=sequences, all=rows))
