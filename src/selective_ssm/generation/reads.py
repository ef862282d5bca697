"""Reading on in some slots, and from graphs where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from selective_ssm.generation.graphs import Graph, Graphs
from selective_ssm.generation.packs import PADDED, Pack, Piece, Size, padded, read, size_of
from selective_ssm.generation.slots import Slots
from selective_ssm.models import LanguageModel


class Reads:
    """Reads pieces of prompts, as `packs.read`: from a graph for each size that packs are padded to.

    On a GPU packs are padded without graphs too, for the answers to be the same.

    Args:
        model: what reads.
        slots: where.
        graphs: where graphs are kept; None reads without.
    """

    def __init__(self, model: LanguageModel, slots: Slots, graphs: Graphs | None) -> None:
        self._model, self._slots, self._graphs = model, slots, graphs
        # Padding is read as a text, and a text must not be longer than a model's positions.
        self._is_padded = slots.pending.is_cuda and model.positions is None
        self._packs: dict[Size, Pack] = {}

    def __call__(self, pieces: Sequence[Piece]) -> None:
        """Read on.

        Args:
            pieces: what, and in which slots: each slot at most once, and no piece without ids.
        """
        exact = size_of(pieces)
        size = padded(exact) if self._is_padded else None
        if self._graphs is not None and size is not None:
            graph = self._graph(size)
            self._packs[size].fill(pieces)
            graph()
        else:
            pack = Pack(size or exact, self._slots)
            pack.fill(pieces)
            read(self._model, self._slots, pack)

    def warm_up(self, most: int) -> None:
        """Make the graphs for packs of up to so many tokens, and for those that these are padded to."""
        for size in PADDED if self._is_padded else ():
            if size.tokens < 2 * most:
                self._graph(size)

    def _graph(self, size: Size) -> Graph[None]:
        """While it is captured all of the pack is padding, so that no text is read."""
        assert self._graphs is not None
        if (graph := self._graphs.get(size)) is None:
            pack = self._packs[size] = Pack(size, self._slots)
            pack.fill([])
            graph = self._graphs.make(size, partial(read, self._model, self._slots, pack))
        return graph
