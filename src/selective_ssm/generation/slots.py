"""Places for sequences that are written side by side, and the two things done to them: reading on, and one more token.

A slot has read everything of its text but the last token, the pending one, which the next step reads. So a text's whole
present is its state, one token and its settings; no logits are kept.

Legend: S slots, B rows: some of the slots, and padding.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain

import torch
from torch import Tensor

from selective_ssm.generation.sampling import Needs, Sampling, Settings, sample
from selective_ssm.models import LanguageModel, ModelState


class Slots:
    """The memory of S sequences. It stays where it is, so that a CUDA graph may be made of what is done to it.

    What is kept beside the states has one row more than there are slots, for padding: the index −1.

    Args:
        model: what reads and writes.
        count: S.
        known: how many ids may be chosen; a model's vocabulary may be padded beyond its tokenizer's.

    Attributes:
        rows_of_size: for each B the memory that `rows` fills.
    """

    def __init__(self, model: LanguageModel, count: int, known: int) -> None:
        device = model.embedding.weight.device
        self.known = known
        self.count = count
        self.state = model.init_state(count)
        self._blank = model.init_state(1)
        self.pending = torch.zeros(count + 1, dtype=torch.int64, device=device)
        self.settings = Settings(*(table.to(device) for table in Settings.of([Sampling()] * (count + 1))))
        self.seen = torch.zeros(count + 1, known, dtype=torch.bool, device=device)
        self.rows_of_size = {size: torch.full((size,), -1, device=device) for size in sizes_up_to(count)}

    def begin(self, slot: int, state: ModelState | None, pending: int, sampling: Sampling, seen: Sequence[int]) -> None:
        """Give a slot to a text.

        Args:
            slot: which.
            state: what the model has read, of one slot, on any device; None is nothing.
            pending: the token that is read next.
            sampling: how tokens are chosen.
            seen: the tokens that a repetition penalty counts as there before; only looked at where there is one.
        """
        self.state.put(self.tensor([slot]), self._blank if state is None else state.to(self.pending.device))
        self.pending[slot : slot + 1].copy_(_pinned([pending], self.pending.device), non_blocking=True)
        for table, row in zip(self.settings, Settings.of([sampling]), strict=True):
            table[slot : slot + 1].copy_(_as_pinned(row, table.device), non_blocking=True)
        if sampling.needs.penalty:
            self.seen[slot].zero_()
            self.seen[slot, self.tensor(seen)] = True

    def held(self, slot: int) -> ModelState:
        """A copy of a slot's state."""
        return self.state.select(self.tensor([slot]))

    def rows(self, slots: Sequence[int]) -> Tensor:
        """The slots as rows, (B,) int64, padded to one of `sizes_up_to` S; in the same memory for each B."""
        rows = next(rows for size, rows in self.rows_of_size.items() if size >= len(slots))
        padded = [*slots, *[-1] * (len(rows) - len(slots))]
        return rows.copy_(_pinned(padded, self.pending.device), non_blocking=True)

    def tensor(self, numbers: Sequence[int]) -> Tensor:
        """Whole numbers, (n,) int64, where the slots are; the device is not waited for."""
        return _pinned(numbers, self.pending.device).to(self.pending.device, non_blocking=True)


def sizes_up_to(count: int) -> list[int]:
    """The numbers of rows that steps have, where there are so many slots: few, as each may have a graph of its own.

    Example:
        >>> sizes_up_to(12)
        [1, 2, 4, 8, 12]
    """
    return [*(1 << power for power in range((count - 1).bit_length())), count]


def read(model: LanguageModel, slots: Slots, of: Sequence[int], chunks: Sequence[Sequence[int]]) -> None:
    """Read on in some slots, a chunk of tokens each, all in one pack.

    Args:
        model: what reads.
        slots: whose states go on.
        of: the slots, each at most once.
        chunks: as many sequences of ids, none of them empty.
    """
    index, ids = slots.tensor(of), slots.tensor(list(chain(*chunks)))
    ends = slots.tensor([0, *accumulate(map(len, chunks))]) if len(chunks) > 1 else None
    slots.state.put(index, model.read(ids[None], slots.state.select(index), cu_seqlens=ends))


def advance(model: LanguageModel, slots: Slots, rows: Tensor, needs: Needs) -> tuple[Tensor, Tensor | None]:
    """One more token for some slots: read the pending one, choose the next, which is pending then.

    It waits for nothing on the host and has fixed shapes.

    Args:
        model: what writes.
        slots: changed in place.
        rows: (B,) int64, the slots, each at most once; −1 is padding.
        needs: what some row needs.

    Returns:
        The tokens (B,), and their log-probabilities (B,) where needed; those of padding mean nothing.
    """
    logits = model.step(slots.pending[rows], slots.state, state_indices=rows).logits
    logits = logits[:, : slots.known]
    tokens, logprobs = sample(logits, slots.settings, slots.state.position, needs, slots.seen, rows)
    slots.pending[rows] = tokens
    if needs.penalty:
        slots.seen[rows, tokens] = torch.ones_like(rows, dtype=torch.bool)  # a number would come from the host
    return tokens, logprobs


@contextmanager
def untracked() -> Generator[None]:
    """No gradients, and no tensors of inference mode, which may not be changed outside of it or in another thread."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _pinned(numbers: Sequence[int], device: torch.device) -> Tensor:
    return _as_pinned(torch.tensor(numbers, dtype=torch.int64), device)


def _as_pinned(x: Tensor, device: torch.device) -> Tensor:
    """Where a GPU can fetch it by itself while the host goes on."""
    return x.pin_memory() if device.type == "cuda" else x
