"""Random arguments for the operators, by what they should exercise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScanCase:
    batch: int = 2
    length: int = 37
    channels: int = 6
    state: int = 4
    groups: int | None = None  # None: B and C without an axis of groups
    fixed: str = ""  # which of "B", "C" are time-invariant
    optional: str = "Dzbi"  # which of D, z, delta_bias, initial_state are given
    lengths: tuple[int, ...] = ()  # of packed sequences
    dtype: torch.dtype = torch.float32
    complex_state: bool = False
    complex_maps: str = "BC"  # which of B and C are complex too, where the state is
    delta_dtype: torch.dtype | None = None  # where it is not that of the others
    strided: bool = False  # whether u, delta and z are parts of a wider projection
    delta_softplus: bool = True
    reverse: bool = False
    discretization: str = "euler"

    def arguments(self, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
        """The tensors that take a gradient, and the rest."""
        generator = torch.Generator().manual_seed(seed)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        rows = len(self.lengths) or self.batch
        batch, length = (1, sum(self.lengths)) if self.lengths else (self.batch, self.length)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        def sequence(dtype: torch.dtype = self.dtype) -> Tensor:
            if self.strided:
                return normal(batch, length, 3 * self.channels, dtype=dtype)[..., self.channels : 2 * self.channels]
            return normal(batch, length, self.channels, dtype=dtype)

        def map_of(name: str) -> Tensor:
            shape = [self.channels, self.state]
            if name not in self.fixed:
                shape = [batch, length, *([] if self.groups is None else [self.groups]), self.state]
            if self.complex_state and name in self.complex_maps:
                return torch.complex(normal(*shape, dtype=wide), normal(*shape, dtype=wide))
            return normal(*shape)

        rates = -torch.rand(self.channels, self.state, generator=generator, dtype=torch.float64) * 4 - 0.1
        A = rates.to(wide)
        if self.complex_state:
            A = torch.complex(A, normal(self.channels, self.state, dtype=wide) * 3)
        tensors = {
            "u": sequence(),
            "delta": sequence(self.delta_dtype or self.dtype),
            "A": A,
            "B": map_of("B"),
            "C": map_of("C"),
        }
        if not self.delta_softplus:
            tensors["delta"] = tensors["delta"].abs() * 0.5
        if "D" in self.optional:
            tensors["D"] = normal(self.channels, dtype=wide)
        if "z" in self.optional:
            tensors["z"] = sequence()
        if "b" in self.optional:
            tensors["delta_bias"] = normal(self.channels, dtype=wide).abs()
        if "i" in self.optional:
            state = normal(rows, self.channels, self.state, dtype=wide)
            tensors["initial_state"] = state.to(A.dtype)
        options: dict[str, Any] = {
            "delta_softplus": self.delta_softplus,
            "reverse": self.reverse,
            "discretization": self.discretization,
        }
        if self.lengths:
            options["cu_seqlens"] = torch.tensor([0, *self.lengths]).cumsum(0).int()
        return {name: x.requires_grad_() for name, x in tensors.items()}, options


def gradients(
    outputs: tuple[Tensor, Tensor], tensors: dict[str, Tensor], weights: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """The gradients of a random weighting of (out, final state); those of complex outputs as torch defines them."""
    loss = sum((x * w.to(x.dtype).conj()).real.sum() for x, w in zip(outputs, weights, strict=True))
    return list(torch.autograd.grad(loss, list(tensors.values())))
