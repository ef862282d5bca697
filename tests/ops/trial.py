"""A case of the wide grid: an operator, its arguments, and what it makes of them on each backend."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selective_ssm.ops import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step
from selective_ssm.ops.selective_scan.plan import plan_forward
from tests.ops import oracle
from tests.ops.guards import Guards

LANES = tuple(sorted({plan_forward(1, 2048, 2**i, 1, 132).lanes for i in range(20)}))
"""Threads of a channel, as many as are ever planned."""
FUNCTIONS = {
    "selective_scan": (functools.partial(selective_scan, return_final_state=True), oracle.scan),
    "causal_conv1d": (functools.partial(causal_conv1d, return_final_state=True), oracle.conv),
    "selective_scan_step": (selective_scan_step, None),
    "causal_conv1d_step": (causal_conv1d_step, None),
}
"""Each operator's public function, and its definition token by token."""


@dataclass
class Trial:
    """A case: an operator's arguments, and what is made of its results."""

    operator: str
    words: str
    guards: Guards
    tokens: int  # of all rows
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    directions: tuple[Tensor | None, ...] = ()  # what the outputs are weighted with; none for a step
    terms: dict[str, int] = field(default_factory=dict)  # of the sums that gradients are
    plan: dict[str, int] = field(default_factory=dict)
    longest: int = 1  # tokens of a sequence

    def results(self, backend: str | None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The outputs and every gradient, perhaps in another precision; without a backend those of the definition."""

        def cast(x: Tensor) -> Tensor:
            return x.detach() if dtype is None else x.detach().to(dtype)

        public, definition = FUNCTIONS[self.operator]
        function = definition if backend is None else functools.partial(public, backend=backend)
        tensors = {name: cast(x) for name, x in self.tensors.items()}
        if not self.directions:
            state = tensors.pop("state")
            state = self.guards.copy(state, state.device)
            return {"out": function(state, **tensors, **self.options), "state": state}
        tensors = {name: x.requires_grad_() for name, x in tensors.items()}
        outputs = function(**tensors, **self.options)
        found = dict(zip(("out", "final_state"), (x.detach() for x in outputs), strict=True))
        pairs = [(x, cast(d)) for x, d in zip(outputs, self.directions, strict=True) if d is not None]
        pairs = [(x, d) for x, d in pairs if x.requires_grad]  # without tokens an oracle's output may depend on nothing
        gradients = [torch.zeros_like(x) for x in tensors.values()]
        if pairs:
            ends, weights = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(ends, list(tensors.values()), weights, materialize_grads=True)
        found |= {f"d_{name}": x for name, x in zip(tensors, gradients, strict=True)}
        return found
