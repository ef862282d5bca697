"""Values and their weights, summed in units of their own: what RWKV's average is made of, and its gradients are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NOTHING = -1e30
"""The logarithm of no weight at all, of which differences can be taken."""


class Sums(NamedTuple):
    """Values and their weights, summed, in units of e^top: as large as it may be, nothing overflows.

    Attributes:
        top: the logarithm of the unit.
        values: the weighted sum of values.
        weights: the sum of weights.
    """

    top: Tensor
    values: Tensor
    weights: Tensor

    @classmethod
    def of(cls, logit: Tensor, value: Tensor) -> Sums:
        """One value, of weight e^logit."""
        return cls(logit, value, torch.ones_like(value))

    def faded(self, by: Tensor) -> Sums:
        """The same with all weights times e^-by."""
        return self._replace(top=self.top - by)

    def and_of(self, other: Sums) -> Sums:
        """Both together."""
        top = torch.maximum(self.top, other.top)
        mine, theirs = torch.exp(self.top - top), torch.exp(other.top - top)
        values = mine * self.values + theirs * other.values
        return Sums(top, values, mine * self.weights + theirs * other.weights)

    def times(self, other: Sums) -> Tensor:
        """The product of both values plus that of both weights."""
        return torch.exp(self.top + other.top) * (self.values * other.values + self.weights * other.weights)

    def where(self, condition: Tensor, other: Sums) -> Sums:
        """These where the condition holds, and the others elsewhere."""
        return Sums(*(torch.where(condition, mine, theirs) for mine, theirs in zip(self, other, strict=True)))

    def at(self, index: int | slice | Tensor) -> Sums:
        """The entries of that index."""
        return self.each(lambda part: part[index])

    def each(self, function: Callable[[Tensor], Tensor]) -> Sums:
        """All three by a function."""
        return Sums(*map(function, self))

    def mean(self) -> Tensor:
        """The average of the values."""
        return self.values / self.weights


def no_average(batch: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The state before the first token: (B, 3, D), `Sums` of nothing, in fp32 at least."""
    state = torch.zeros(batch, 3, width, device=device, dtype=torch.promote_types(dtype, torch.float32))
    state[:, 0] = NOTHING
    return state
