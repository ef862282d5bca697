"""What a function computes from parameters alone, computed once: for functions that a CUDA graph runs over and over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from selective_ssm.ops.recording import ALLOCATE
from selective_ssm.ops.registration import implementation_of

T = TypeVar("T")


class Constants:
    """The results of a function's operators whose tensors are all parameters, or computed from such.

    A = −exp(A_log) and parameters in fp32 are made anew by each step of a model, which costs as many launches as its
    kernels; in a graph they are made once. What allocates memory, or draws random numbers, runs each time. The function
    must call the same operators in the same order each time, and what is made of them must not be written to. When a
    parameter changes, the constants are of no use any more.

    Args:
        parameters: the tensors that do not change.

    Example:
        >>> import torch
        >>> weight, x = torch.ones(2), torch.zeros(2)
        >>> constants = Constants([weight])
        >>> constants.learn(lambda: x + weight.exp()).tolist() == constants.serve(lambda: x + weight.exp()).tolist()
        True
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._results: list[Any] = []

    def learn(self, function: Callable[[], T]) -> T:
        """Run the function, and remember what it computes from parameters alone."""
        self._results = []

        def learned(func: Any, args: Any, kwargs: Any) -> Any:
            self._results.append(func(*args, **kwargs))
            return self._results[-1]

        with _Watching(self._parameters, learned):
            return function()

    def serve(self, function: Callable[[], T]) -> T:
        """Run the function with what is remembered in the place of those operators."""
        results = iter(self._results)

        def served(func: Any, args: Any, kwargs: Any) -> Any:
            # Autograd gives what an operator returns properties of its own, and takes no tensor that already has some.
            return tree_map_only(Tensor, Tensor.detach, next(results))

        with _Watching(self._parameters, served):
            return function()


class _Watching(TorchDispatchMode):
    """Sees every operator of torch, those within operators of ours too, and hands over those that take only parameters.

    Args:
        parameters: the tensors that do not change.
        constant: (operator, arguments, keywords) -> the result of one that takes only these, or what they made.
    """

    def __init__(self, parameters: Iterable[Tensor], constant: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self._constant = constant
        self._known = {_place(x) for x in parameters} - {0}  # an empty tensor has no place of its own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        implementation = implementation_of(func)
        if implementation is not None:
            with self:
                return implementation(*args, **kwargs)
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        runs_again = func._schema.is_mutable or func in ALLOCATE or torch.Tag.nondeterministic_seeded in func.tags
        if runs_again or not taken or not all(_place(x) in self._known for x in taken):
            return func(*args, **kwargs)
        result = self._constant(func, args, kwargs)
        self._known |= {_place(x) for x in tree_leaves(result) if isinstance(x, Tensor)} - {0}
        return result


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
