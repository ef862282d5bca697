"""How a scan is dealt out over a CPU: pure functions of sizes, so that the number of threads changes no bit.

Legend: a *block* is some neighbouring channels of one group, which a task serves; a *piece* is the part of a row that a
task runs through, where rows are cut; a *window* is the tokens between two states that are kept for the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import NamedTuple

LANES, WINDOW = 16, 128
"""Channels of a vector, as in vector.hpp; tokens of a window, as in scan.hpp."""
TASKS = 16
"""As many are wanted; of a row going backward, where each has sums of its own for the gradients of B and C, no more."""
WIDTHS = (64, 32, LANES)
"""Channels that a block may have. Narrow ones cost a little: each reads B and C of all tokens by itself."""
LEAST_PIECE = 8192
"""Tokens that a piece has at least."""
SLICES = 16
"""Into which tokens are cut going backward where blocks are widest; after each, tasks' sums are added up, and their
memory serves again. Narrower blocks make more tasks, and slices in proportion, so that all sums take as much."""


class Layout(NamedTuple):
    """Whom the tasks of either pass serve."""

    width: int  # channels of a block
    piece: int  # tokens of a piece, whole windows; a row that has no more is not cut

    def blocks(self, channels: int, groups: int) -> int:
        """Blocks for all channels; none straddles groups, whose maps differ."""
        return groups * -(-channels // groups // self.width)

    def pieces(self, length: int) -> int:
        """Pieces of a row."""
        return -(-length // self.piece)


class Dealing(NamedTuple):
    """How the backward pass is dealt out, which decides in what order sums are added up."""

    parts: int  # served side by side: some rows, of each a piece
    group_tasks: int  # into which the blocks of a group's channels are dealt out
    slice: int  # windows of a part that are served before sums over channels are added up


_overridden: dict[str, int] = {}


@contextlib.contextmanager
def overridden(**fields: int) -> Generator[None]:
    """Layouts have these fields while it lasts: for tests and measurements."""
    before = dict(_overridden)
    _overridden.update(fields)
    try:
        yield
    finally:
        _overridden.clear()
        _overridden.update(before)


def lay_out(batch: int, length: int, channels: int, groups: int) -> Layout:
    """The layout for so many rows, tokens, channels and groups.

    Where tasks are few, blocks are narrower, which costs little. Rows are cut only where tasks are very few even so,
    since then the recurrence is run twice: for the states at the ends of pieces, and again from these.

    Example:
        >>> lay_out(1, 2048, 1536, 1), lay_out(1, 65536, 64, 1), lay_out(1, 2**20, 16, 1)
        (Layout(width=64, piece=2048), Layout(width=16, piece=65536), Layout(width=16, piece=65536))
    """
    windows = -(-length // WINDOW)
    layouts = [Layout(width, windows * WINDOW) for width in WIDTHS]
    layout = next((x for x in layouts if batch * x.blocks(channels, groups) >= TASKS), layouts[-1])
    tasks = batch * layout.blocks(channels, groups)
    if 4 * tasks < TASKS:
        pieces = max(1, min(-(-TASKS // tasks), length // LEAST_PIECE))
        layout = layout._replace(piece=-(-windows // pieces) * WINDOW)
    return layout._replace(**_overridden)


def deal_backward(batch: int, length: int, channels: int, groups: int) -> tuple[Layout, Dealing]:
    """The layout, and what the backward pass makes of it.

    Example:
        >>> deal_backward(1, 2048, 1536, 1)
        (Layout(width=64, piece=2048), Dealing(parts=1, group_tasks=16, slice=1))
        >>> deal_backward(1, 2**20, 16, 1)
        (Layout(width=16, piece=65536), Dealing(parts=16, group_tasks=1, slice=8))
    """
    layout = lay_out(batch, length, channels, groups)
    group_tasks = min(layout.blocks(channels, groups) // groups, max(1, TASKS // groups))
    rows = min(batch, max(1, TASKS // (groups * group_tasks)))  # side by side
    windows = -(-batch // rows) * -(-min(length, layout.piece) // WINDOW)
    slices = SLICES * WIDTHS[0] // layout.width
    return layout, Dealing(rows * layout.pieces(length), group_tasks, max(1, windows // slices))
