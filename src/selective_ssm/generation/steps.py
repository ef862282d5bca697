"""One more token for some slots, and from graphs where there are any.

Legend: B rows: some of the slots, and padding.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from selective_ssm.generation.graphs import Graph, Graphs
from selective_ssm.generation.sampling import ALL, Needs
from selective_ssm.generation.slots import Slots, advance
from selective_ssm.models import LanguageModel

_Written = tuple[Tensor, "Tensor | None"]


class Steps:
    """Writes one more token in some slots, as `slots.advance`: from a graph for each B and each work.

    Args:
        model: what writes.
        slots: where.
        graphs: where graphs are kept; None writes without.
    """

    def __init__(self, model: LanguageModel, slots: Slots, graphs: Graphs | None) -> None:
        self._model, self._slots, self._graphs = model, slots, graphs

    def __call__(self, rows: Tensor, needs: Needs) -> _Written:
        """One more token.

        Args:
            rows: (B,) int64, from `Slots.rows`.
            needs: what some row needs.

        Returns:
            The tokens (B,), and their log-probabilities (B,) where needed; a graph's lie where the next one writes to.
        """
        if self._graphs is None:
            return advance(self._model, self._slots, rows, needs)
        return self._graph(rows, _rounded_up(needs))()

    def warm_up(self, needs: Needs) -> None:
        """Make the graphs for every number of rows."""
        for rows in self._slots.rows_of_size.values():
            self._graph(rows, _rounded_up(needs))

    def _graph(self, rows: Tensor, needs: Needs) -> Graph[_Written]:
        """While it is captured all rows are padding, so that nothing is written."""
        assert self._graphs is not None
        key = (len(rows), needs)
        if (graph := self._graphs.get(key)) is None:
            wanted = rows.clone()
            rows.fill_(-1)
            graph = self._graphs.make(key, partial(advance, self._model, self._slots, rows, needs))
            rows.copy_(wanted)
        return graph


def _rounded_up(needs: Needs) -> Needs:
    """What kernels on a GPU do for so much: the same for every top-k, and with min-p or without."""
    return needs._replace(ranked=ALL if needs.ranked else 0, likely=needs.draw)
