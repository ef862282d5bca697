"""Steps as CUDA graphs: one launch in the place of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from selective_ssm.ops.constants import Constants
from selective_ssm.ops.driver import overlapping

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE  # pyright: ignore[reportPrivateUsage]

T = TypeVar("T")


class Graph(Generic[T]):
    """A function on a GPU, captured once and run again by one launch.

    It runs three times before the graph is there: so what it reads must then be such that no harm is done (rows that
    are padding, say).

    Args:
        function: what to run. It must read nothing but tensors that stay where they are, ask nothing of the GPU, leave
            its parameters alone and step no state twice (see `ops.driver.overlapping`).
        parameters: tensors that do not change as long as the graph is used; what the function computes from them alone
            is computed here.
        device: a CUDA device.
        pool: of the memory in which its results lie; graphs that share one must run in turns.
    """

    def __init__(
        self,
        function: Callable[[], T],
        parameters: Iterable[Tensor],
        device: torch.device,
        pool: _POOL_HANDLE | None = None,
    ) -> None:
        self._constants = Constants(parameters)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            function()
            self._constants.learn(function)
        stream.synchronize()
        with torch.cuda.graph(self._graph, pool=pool, stream=stream), overlapping():
            self._result = self._constants.serve(function)

    def __call__(self) -> T:
        """Run it on the current stream; the result is overwritten by the next run."""
        self._graph.replay()
        return self._result
