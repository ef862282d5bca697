"""Where the tokens of one or many packed sequences stand: the index arithmetic that every reference operator shares.

Legend: B batch, L length of a row, S sequences in a pack, T steps in a segment, M segments.

A row without ``cu_seqlens`` is a pack of one sequence, so that no operator needs two code paths. Everything is computed
on the device from ``cu_seqlens``; only sizes are read on the host, so nothing here waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def boundaries(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """The (S + 1,) int64 offsets of the sequences in a row; one sequence when nothing is packed.

    Values out of order or out of range are clamped, so that whatever they hold no index leaves the row.
    """
    if cu_seqlens is None:
        return torch.arange(2, device=device) * length
    return cu_seqlens.long().clamp(0, length).cummax(0).values


def covering(cu_seqlens: Tensor, length: int) -> Tensor:
    """The `boundaries` of a pack, contiguous and with every token of the row in a sequence, whatever values there are.

    Example:
        >>> covering(torch.tensor([1, 9, 2, 5]), 6)
        tensor([0, 6, 6, 6])
    """
    offsets = boundaries(length, cu_seqlens, cu_seqlens.device).contiguous()
    offsets[0], offsets[-1] = 0, length
    return offsets


@dataclass(frozen=True)
class Order:
    """In which order the sequences between `offsets` are visited: each from its first token, or from its last."""

    offsets: Tensor  # (S + 1,)
    reverse: bool
    is_row: bool = False  # whether it is known, without a look at `offsets`, that one sequence is all of the row

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def token(self, sequence: Tensor, position: Tensor) -> Tensor:
        """The place in the row of what is visited at a position (0 is the first) of a sequence."""
        if self.reverse:
            return self.offsets[sequence + 1] - 1 - position
        return self.offsets[sequence] + position

    def find(self, length: int) -> tuple[Tensor, Tensor]:
        """The sequence and the position of each of the row's tokens: two (L,); the inverse of `token`."""
        token = torch.arange(length, device=self.offsets.device)
        last = len(self.offsets) - 2
        sequence = (torch.searchsorted(self.offsets, token, right=True) - 1).clamp(0, last)
        if self.reverse:
            return sequence, self.offsets[sequence + 1] - 1 - token
        return sequence, token - self.offsets[sequence]


def token_positions(before: Tensor | None, length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """The position of each token in its own text, (B, L), or (1, L) where all rows begin at 0.

    Args:
        before: (B,), or (S,) where sequences are packed: how many tokens each has had; None is none.
        length: L.
        cu_seqlens: (S + 1,) boundaries of packed sequences.
        device: where the positions are wanted.

    Example:
        >>> token_positions(torch.tensor([7, 0]), 5, torch.tensor([0, 2, 5]), torch.device("cpu"))
        tensor([[7, 8, 0, 1, 2]])
    """
    if cu_seqlens is None:
        steps = torch.arange(length, device=device)[None]
        return steps if before is None else before[:, None] + steps
    sequence, position = Order(covering(cu_seqlens, length), reverse=False).find(length)
    return (position if before is None else position + before[sequence])[None]


@dataclass(frozen=True)
class Segments:
    """A row cut into segments of T consecutive steps, each wholly inside one sequence; the last of each is padded."""

    token: Tensor  # (T, M) the position in the row; padding repeats a token of the same sequence
    is_padding: Tensor  # (T, M)
    slot: Tensor  # (L,) where each token stands in `token`, flattened
    sequence: Tensor  # (M,) the sequence a segment belongs to
    is_first: Tensor  # (M,) whether a sequence starts here
    is_last: Tensor  # (M,) whether a sequence ends here
    first: Tensor  # (S,) each sequence's first segment; means nothing where the sequence is empty
    last: Tensor  # (S,) each sequence's last segment; likewise
    is_empty: Tensor  # (S,)
    is_whole: bool  # whether it is known that all tokens stand in `token` in their order, without padding

    def spread(self, x: Tensor) -> Tensor:
        """(B, L, F) -> (T, M, B, F), the same step of all segments side by side."""
        if self.is_whole:
            return x.unflatten(1, self.token.shape[::-1]).movedim((2, 1), (0, 1))
        return x.transpose(0, 1).index_select(0, self.token.flatten()).unflatten(0, self.token.shape)

    def join(self, x: Tensor) -> Tensor:
        """(T, M, B, F) -> (B, L, F): undoes `spread`, dropping the padding."""
        if self.is_whole:
            return x.movedim((0, 1), (2, 1)).flatten(1, 2).contiguous()
        return x.flatten(0, 1).index_select(0, self.slot).transpose(0, 1).contiguous()


def count_segments(length: int, sequences: int, steps: int) -> int:
    """How many segments serve every way to cut `length` tokens into so many sequences (some may stay unused)."""
    return -(-length // steps) if sequences == 1 else length // steps + sequences


def cut(order: Order, length: int, steps: int) -> Segments:
    """Cuts the sequences into segments of so many steps, in the order they are visited."""
    lengths = order.lengths
    per_sequence = (lengths + steps - 1) // steps
    after = per_sequence.cumsum(0)
    first = after - per_sequence

    segment = torch.arange(count_segments(length, len(lengths), steps), device=lengths.device)
    sequence = torch.searchsorted(after, segment, right=True).clamp_max(len(lengths) - 1)
    within = segment - first[sequence]
    position = within * steps + torch.arange(steps, device=lengths.device)[:, None]
    is_padding = position >= lengths[sequence]
    position = torch.minimum(position, lengths[sequence] - 1)
    token = order.token(sequence, position).clamp(0, length - 1)
    return Segments(
        token=token,
        is_padding=is_padding,
        slot=_inverse(torch.where(is_padding, length, token).flatten(), length),
        sequence=sequence,
        is_first=within == 0,
        is_last=within == per_sequence[sequence] - 1,
        first=first.clamp_max(len(segment) - 1),
        last=(after - 1).clamp_min(0),
        is_empty=lengths == 0,
        is_whole=order.is_row and not order.reverse and length % steps == 0,
    )


def _inverse(index: Tensor, length: int) -> Tensor:
    """For each of `length` places the position in `index` that names it; `index` may also name `length`: nowhere."""
    places = index.new_zeros(length + 1)
    return places.scatter_(0, index, torch.arange(len(index), device=index.device))[:length]
