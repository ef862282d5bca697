"""Steps as CUDA graphs: one launch in the place of hundreds.

Legend: B rows: some of the slots, and padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from selective_ssm.generation.sampling import ALL, Needs
from selective_ssm.generation.slots import Slots, advance
from selective_ssm.models import LanguageModel
from selective_ssm.models.fingerprint import stamp
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


class Steps:
    """Writes one more token in some slots: as `slots.advance`, and on a GPU from a graph for each B and each work.

    Graphs are made when first needed, and anew when the model's parameters have changed since.

    Args:
        model: what writes.
        slots: where.
        uses_graphs: whether there are graphs; slots must then be on a GPU.
    """

    def __init__(self, model: LanguageModel, slots: Slots, *, uses_graphs: bool) -> None:
        self._model, self._slots, self._uses_graphs = model, slots, uses_graphs
        self._graphs: dict[tuple[int, Needs], Graph[tuple[Tensor, Tensor | None]]] = {}
        self._made_from: list[object] = []
        self._pool: _POOL_HANDLE | None = None

    def __call__(self, rows: Tensor, needs: Needs) -> tuple[Tensor, Tensor | None]:
        """One more token.

        Args:
            rows: (B,) int64, from `Slots.rows`.
            needs: what some row needs.

        Returns:
            The tokens (B,), and their log-probabilities (B,) where needed, in memory that the next step writes to.
        """
        if not self._uses_graphs:
            return advance(self._model, self._slots, rows, needs)
        needs = _rounded_up(needs)
        graph = self._graphs.get((len(rows), needs)) or self._captured(rows, needs)
        return graph()

    def look_at_parameters(self) -> None:
        """Let go of graphs that were made from other parameters than those there are."""
        if self._uses_graphs:
            there = stamp(self._model)
            if there != self._made_from:
                self._graphs.clear()
                self._made_from = there

    def warm_up(self, needs: Needs) -> None:
        """Make the graphs for every number of rows."""
        self.look_at_parameters()
        needs = _rounded_up(needs)
        for size, rows in self._slots.rows_of_size.items() if self._uses_graphs else ():
            if (size, needs) not in self._graphs:
                self._captured(rows, needs)

    def _captured(self, rows: Tensor, needs: Needs) -> Graph[tuple[Tensor, Tensor | None]]:
        """While it is captured all rows are padding, so that nothing is written."""
        wanted = rows.clone()
        rows.fill_(-1)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        step = partial(advance, self._model, self._slots, rows, needs)
        weights = (*self._model.parameters(), *self._model.buffers())
        graph = Graph(step, weights, rows.device, self._pool)
        rows.copy_(wanted)
        self._graphs[len(rows), needs] = graph
        return graph


def _rounded_up(needs: Needs) -> Needs:
    """What kernels on a GPU do for so much: the same for every top-k, and with min-p or without."""
    return needs._replace(ranked=ALL if needs.ranked else 0, likely=needs.draw)
