"""Which slots of a larger state a step touches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selective_ssm.ops import checks


@dataclass(frozen=True)
class Slots:
    """Which slots the rows of a step read and write, in plain torch and without waiting for the device.

    Padding does as a row that is none: it reads that row's slot and writes that row's values, so that it does not
    matter which of the two is written last.

    Example:
        >>> state = torch.tensor([1.0, 2.0, 3.0])
        >>> slots = Slots.named(torch.tensor([2, -1]), 2, state)
        >>> slots.put(state, slots.take(state) + torch.tensor([10.0, 20.0]))
        >>> state.tolist()
        [1.0, 2.0, 13.0]
    """

    index: Tensor  # (B,) the slot of each row
    source: Tensor | None  # (B,) the row whose values a row writes; None where row b uses slot b
    is_used: Tensor  # (B,) whether there is such a row: False where all are padding

    @classmethod
    def named(cls, state_indices: Tensor | None, batch: int, state: Tensor) -> Slots:
        """The slots that `state_indices` (B,) names of a state whose first axis they are; None names all in order."""
        if state_indices is None:
            if len(state) != batch:
                raise ValueError(f"the state has {len(state)} slots for {batch} rows; give state_indices")
        else:
            checks.state_indices(state_indices, batch, len(state))
        return cls.of(state_indices, state)

    @classmethod
    def of(cls, state_indices: Tensor | None, state: Tensor) -> Slots:
        """The same of indices that were checked; one past the last slot, which slipped through, names the last."""
        if state_indices is None:
            index = torch.arange(len(state), device=state.device)
            return cls(index, None, torch.ones_like(index, dtype=torch.bool))
        is_real = state_indices >= 0
        row = torch.arange(len(state_indices), device=state.device)
        source = torch.where(is_real, row, is_real.long().argmax() if len(row) else 0)
        return cls(state_indices[source].long().clamp(0, len(state) - 1), source, is_real[source])

    def take(self, state: Tensor) -> Tensor:
        """What the slots hold, (B, …): a copy, or the state itself where it has all of them in order."""
        return state if self.source is None else state[self.index]

    def blank(self, out: Tensor) -> Tensor:
        """What a step gives (B, …), zero where a row is padding."""
        if self.source is None:
            return out
        is_real = (self.source == torch.arange(len(out), device=out.device)) & self.is_used
        return out.masked_fill(~is_real.view(-1, *[1] * (out.ndim - 1)), 0)

    def put(self, state: Tensor, values: Tensor) -> None:
        """Overwrite the slots, in place, with values (B, …)."""
        if self.source is not None:
            self.put_at(state, (self.index,), values, self.is_used)
        elif values is not state:
            state.copy_(values)

    def put_at(self, state: Tensor, places: tuple[Tensor, ...], values: Tensor, is_written: Tensor) -> None:
        """Overwrite state[places], where the first of the places are the slots, but for rows that write nothing."""
        values = values if self.source is None else values[self.source]
        is_written = is_written.view(-1, *[1] * (values.ndim - 1))
        state[places] = torch.where(is_written, values.to(state.dtype), state[places])
