"""What a model does, as CUDA graphs: one launch in the place of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from selective_ssm.models import LanguageModel
from selective_ssm.ops.constants import Constants
from selective_ssm.ops.driver import overlapping

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE  # pyright: ignore[reportPrivateUsage]

T = TypeVar("T")


class Graph(Generic[T]):
    """A function on a GPU, captured once and run again by one launch.

    It runs three times before the graph is there: so what it reads must then be such that no harm is done (all of it
    padding, say).

    Args:
        function: what to run. It must read nothing but tensors that stay where they are, ask nothing of the GPU, leave
            its parameters alone and step no state twice (see `ops.driver.overlapping`).
        parameters: tensors that do not change as long as the graph is used; what the function computes from them alone
            is computed here.
        device: a CUDA device.
        pool: of the memory in which its results lie; graphs that share one must run in turns.
        stream: where it is captured, a new one by default. cuBLAS keeps memory to work in for each stream that it has
            seen, so graphs that run in turns should share one of these, too.
    """

    def __init__(
        self,
        function: Callable[[], T],
        parameters: Iterable[Tensor],
        device: torch.device,
        pool: _POOL_HANDLE | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._constants = Constants(parameters)
        self._graph = torch.cuda.CUDAGraph()
        stream = stream or torch.cuda.Stream(device)
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


class Graphs:
    """Graphs of functions that read a model's parameters, by any key. They share their memory, so they run in turns.

    Args:
        model: whose parameters.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._graphs: dict[Hashable, Graph[Any]] = {}
        self._reader: object = None
        self._pool: _POOL_HANDLE | None = None
        self._stream: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def keep_those_of(self, reader: object) -> None:
        """Let go of all graphs, unless they are of an equal reader: of the parameters there are."""
        if reader != self._reader:
            self._graphs.clear()
            self._reader = reader

    def get(self, key: Hashable) -> Graph[Any] | None:
        """The graph of that key, if it was made."""
        return self._graphs.get(key)

    def make(self, key: Hashable, function: Callable[[], Any]) -> Graph[Any]:
        """Make a graph of a function, as `Graph` does."""
        device = self._model.embedding.weight.device
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream(device)
        weights = (*self._model.parameters(), *self._model.buffers())
        graph = self._graphs[key] = Graph(function, weights, device, self._pool, self._stream)
        return graph
