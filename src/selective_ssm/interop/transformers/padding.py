"""Batches with padding as packs without: what stands beside a sequence then cannot reach it.

Legend: B batch, L length, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.errors import UserError


@dataclass(frozen=True)
class Padding:
    """Where the tokens of a padded batch go in a pack: row by row those that count, after them all padding.

    The padding is a sequence of its own, so that every size is known without looking at the mask, and nothing waits for
    a GPU. Wherever it stood, left, right or between, each row is the sequence that it is without.

    Attributes:
        slot: (B, L) each token's place in the pack.
        cu_seqlens: (B + 2,) boundaries of the rows and the padding.
    """

    slot: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, mask: Tensor | None, batch: int, length: int) -> Padding | None:
        """Read an attention mask.

        Args:
            mask: (B, at least L), 0 where there is padding; of a longer one the last L columns count, as those before
                are of tokens that a cache has had. None is no padding.
            batch: B.
            length: L.

        Returns:
            The padding; None where there is none, as far as can be told without waiting for a device.

        Raises:
            UserError: the mask is of another shape.

        Example:
            >>> padding = Padding.of(torch.tensor([[0, 1, 1], [1, 1, 1]]), batch=2, length=3)
            >>> x = torch.arange(6.0).view(2, 3, 1)
            >>> padding.pack(x).flatten().tolist(), padding.cu_seqlens.tolist()
            ([1.0, 2.0, 3.0, 4.0, 5.0, 0.0], [0, 2, 5, 6])
            >>> torch.equal(padding.unpack(padding.pack(x)), x)
            True
        """
        if mask is None:
            return None
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
            raise UserError(f"attention_mask has the shape {tuple(mask.shape)}; expected ({batch}, {length}) or longer")
        counts = mask[:, -length:] != 0
        if counts.is_cpu and not torch.compiler.is_compiling() and bool(counts.all()):
            return None
        flat, lengths = counts.flatten(), counts.sum(1)
        after = lengths.sum() + (~flat).cumsum(0)
        slot = torch.where(flat, flat.cumsum(0), after) - 1
        ends = lengths.cumsum(0)
        return cls(slot.view_as(counts), F.pad(torch.cat((ends, ends.new_full((1,), flat.numel()))), (1, 0)))

    @property
    def tokens(self) -> int:
        """How many tokens count; to ask is to wait for the device."""
        return int(self.cu_seqlens[-2])

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) as one row (1, B L, ...)."""
        flat = x.flatten(0, 1)
        return torch.zeros_like(flat).index_copy(0, self.slot.flatten(), flat)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, B L, ...) as it was before `pack`; of (1, tokens, ...) something else stands where there is padding."""
        rows = x[0] if x.shape[1] else x.new_zeros(1, *x.shape[2:])  # where nothing but padding is
        return rows.index_select(0, self.slot.flatten().clamp_max(len(rows) - 1)).unflatten(0, self.slot.shape)
