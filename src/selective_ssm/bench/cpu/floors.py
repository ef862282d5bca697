"""What a CPU could do at best: the least work that a subject cannot do without, timed in the same turns as the subject.

Legend: B batch, L length, D channels, N state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from selective_ssm.bench.cases import OpCase
from selective_ssm.models import LanguageModel

_IN_CACHE = 2**16  # numbers, of which a source and a target fit the second cache
_PRODUCT = 1024  # rows and columns of a product that shows the peak of multiply-adds
_MULTIPLY_ADDS = 3  # of a state and token: into it, out of it, and its decay


class Exponentials:
    """What a scan cannot do without: an exponential and three multiply-adds for each of B·L·D·N states, on one thread.

    Exponentials are torch's, over a buffer that stays in the second cache; multiply-adds at the pace of a large matrix
    product.
    """

    def __init__(self, case: OpCase) -> None:
        self._count = case.elements * case.states
        self._numbers = -torch.rand(_IN_CACHE)
        self._out = torch.empty(_IN_CACHE)
        self._factor = torch.randn(_PRODUCT, _PRODUCT)
        self._product = torch.empty(_PRODUCT, _PRODUCT)

    def calls(self) -> dict[str, Callable[[], object]]:
        """What is to be timed."""
        return {"exponentials": self._exponentials, "multiply-adds": self._multiply_adds}

    def seconds(self, taken: Mapping[str, float]) -> float:
        """The floor, from the times of `calls`."""
        multiply_adds = _MULTIPLY_ADDS * self._count / _PRODUCT**3
        return taken["exponentials"] + multiply_adds * taken["multiply-adds"]

    def _exponentials(self) -> None:
        for _ in range(self._count // _IN_CACHE):
            torch.exp(self._numbers, out=self._out)
        rest = self._count % _IN_CACHE
        torch.exp(self._numbers[:rest], out=self._out[:rest])

    def _multiply_adds(self) -> None:
        torch.mm(self._factor, self._factor, out=self._product)


def products(weights: list[Tensor], tokens: int) -> Callable[[], object]:
    """A prompt's matrix products alone, into memory at hand: every token, but through the head only the last one."""
    inputs = _matrices(weights, lambda weight: (tokens, weight.shape[1]))
    outputs = _matrices(weights, lambda weight: (tokens, weight.shape[0]))

    @torch.no_grad()
    def call() -> None:
        for weight in weights[:-1]:
            torch.mm(inputs[weight.shape], weight.t(), out=outputs[weight.shape])
        head = weights[-1]
        torch.mm(inputs[head.shape][-1:], head.t(), out=outputs[head.shape][-1:])

    return call


def products_with_gradients(weights: list[Tensor], tokens: int) -> Callable[[], object]:
    """A training step's matrix products alone: forward, and the gradients of inputs and weights, the head included."""
    inputs, d_inputs = (_matrices(weights, lambda weight: (tokens, weight.shape[1])) for _ in range(2))
    outputs = _matrices(weights, lambda weight: (tokens, weight.shape[0]))
    d_weights = _matrices(weights, lambda weight: tuple(weight.shape))

    @torch.no_grad()
    def call() -> None:
        for weight in weights:
            x, out = inputs[weight.shape], outputs[weight.shape]
            torch.mm(x, weight.t(), out=out)
            torch.mm(out, weight, out=d_inputs[weight.shape])
            torch.mm(out.t(), x, out=d_weights[weight.shape])

    return call


def _matrices(weights: list[Tensor], shape: Callable[[Tensor], tuple[int, ...]]) -> dict[torch.Size, Tensor]:
    """Something to multiply or to write to, for each shape of a weight."""
    return {one.shape: torch.randn(shape(one)).to(one.dtype) for one in weights}


def reading(model: LanguageModel) -> Callable[[], object]:
    """Reads as many bytes as the model's parameters have, once, with every thread."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    return partial(torch.sum, torch.ones(size // 4))
