"""Places for sequences that are written side by side, and one more token for some of them.

A slot has read everything of its text but the last token, the pending one, which the next step reads. So a text's whole
present is its state, one token and its settings; no logits are kept.

Legend: S slots, B rows: some of the slots, and padding.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from selective_ssm.generation.sampling import Needs, Sampling, Settings, sample
from selective_ssm.models import LanguageModel, ModelState


class Beginning(NamedTuple):
    """A text that is given a slot.

    Attributes:
        slot: which.
        state: what the model has read, of one slot, on any device; None is nothing.
        pending: the token that is read next.
        sampling: how tokens are chosen.
        seen: the tokens that a repetition penalty counts as there before; only looked at where there is one.
    """

    slot: int
    state: ModelState | None
    pending: int
    sampling: Sampling
    seen: Sequence[int]


class Slots:
    """The memory of S sequences. It stays where it is, so that a CUDA graph may be made of what is done to it.

    There is one slot more, the last one, for padding.

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
        self.state = model.init_state(count + 1)
        self._blank = model.init_state(1)
        self.pending = torch.zeros(count + 1, dtype=torch.int64, device=device)
        self.settings = Settings(*(table.to(device) for table in Settings.of([Sampling()] * (count + 1))))
        self.seen = torch.zeros(count + 1, known, dtype=torch.bool, device=device)
        self.rows_of_size = {size: torch.full((size,), -1, device=device) for size in sizes_up_to(count)}

    def begin(self, texts: Sequence[Beginning]) -> None:
        """Give slots to texts."""
        index = self.tensor([text.slot for text in texts])
        blank = self.tensor([0] * len(texts))
        self.state.put(index, self._blank.select(blank))
        self.pending[index] = self.tensor([text.pending for text in texts])
        for table, rows in zip(self.settings, Settings.of([text.sampling for text in texts]), strict=True):
            table[index] = pinned(rows, table.device).to(table.device, non_blocking=True)
        for text in texts:
            if text.state is not None:
                self.state.put(self.tensor([text.slot]), text.state.to(self.pending.device))
            if text.sampling.needs.penalty:
                self.seen[text.slot].zero_()
                self.seen[text.slot, self.tensor(text.seen)] = True

    def held(self, slot: int) -> ModelState:
        """A copy of a slot's state."""
        return self.state.select(self.tensor([slot]))

    def rows(self, slots: Sequence[int]) -> Tensor:
        """The slots as rows, (B,) int64, padded to one of `sizes_up_to` S; in the same memory for each B."""
        rows = next(rows for size, rows in self.rows_of_size.items() if size >= len(slots))
        padded = [*slots, *[-1] * (len(rows) - len(slots))]
        return rows.copy_(pinned(padded, rows.device), non_blocking=True)

    def tensor(self, numbers: Sequence[int]) -> Tensor:
        """Whole numbers, (n,) int64, where the slots are; the device is not waited for."""
        return pinned(numbers, self.pending.device).to(self.pending.device, non_blocking=True)


def sizes_up_to(count: int) -> list[int]:
    """The numbers of rows that steps have, where there are so many slots: few, as each may have a graph of its own.

    Example:
        >>> sizes_up_to(12)
        [1, 2, 4, 8, 12]
    """
    return [*(1 << power for power in range((count - 1).bit_length())), count]


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


def pinned(numbers: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Numbers, int64 by default, where a GPU can fetch them by itself while the host goes on."""
    held = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=torch.int64)
    return held.pin_memory() if device.type == "cuda" else held
