"""Synthetic tasks, drawn as they are needed: what a model must remember to answer them.

Legend: B rows, L length, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from selective_ssm.config import Config
from selective_ssm.data.loader import IGNORE, Batch
from selective_ssm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SyntheticTask(Config):
    """Base of the tasks.

    Args:
        length: tokens of a row before the answers are asked for, or, where questions and answers follow each other,
            of the row.
        vocab_size: V, all tokens with a meaning of their own included.
    """

    length: int
    vocab_size: int

    def __post_init__(self) -> None:
        least = {"length": self._least_length, "vocab_size": self._least_vocabulary}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"{self.kind}: {name} must be {bound} or more, got {getattr(self, name)}")

    @property
    @abstractmethod
    def due(self) -> slice:
        """The places of a row among which all answers are due."""

    @property
    @abstractmethod
    def _least_length(self) -> int:
        """The fewest tokens that have room for the task."""

    @property
    @abstractmethod
    def _least_vocabulary(self) -> int:
        """The smallest vocabulary in which there is something to choose from."""

    @abstractmethod
    def draw(self, rows: int, generator: torch.Generator) -> Batch:
        """Draw rows of the task.

        Args:
            rows: B.
            generator: of the random numbers, on the device where the rows are wanted (see `generator_of`).

        Returns:
            ids and targets, both (B, L'): a target is the answer that is due after its token, -100 where none is.
        """


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(SyntheticTask):
    """Say the tokens again, in their order, that stood at random places among noise.

    A row is ``length`` tokens, all of them noise (0) but ``items``, and then as many times the token that asks for the
    next one (V - 1). Where the tokens stand differs from row to row, so a model must look at what it sees to know what
    to keep, and a time-invariant one cannot.

    Args:
        length: tokens among which the items are.
        vocab_size: V; items are 1 to V - 2.
        items: how many tokens are to be said again.

    Source: Gu & Dao, "Mamba" (arXiv 2312.00752), section 3.1, and appendix E.1 for the settings.

    Example:
        >>> batch = SelectiveCopying(length=6, vocab_size=5, items=2).draw(1, generator_of(0, "cpu"))
        >>> kept = batch.ids[batch.ids.ne(0) & batch.ids.ne(4)]
        >>> batch.ids[0, 6:].tolist(), batch.targets[0, 6:].equal(kept)
        ([4, 4], True)
    """

    kind: ClassVar[str] = "selective_copying"

    length: int = 4096
    vocab_size: int = 16
    items: int = 16

    def __post_init__(self) -> None:
        if self.items < 1:
            raise UserError(f"{self.kind}: items must be 1 or more, got {self.items}")
        super().__post_init__()

    @property
    def due(self) -> slice:
        return slice(self.length, self.length + self.items)

    @property
    def _least_length(self) -> int:
        return self.items

    @property
    def _least_vocabulary(self) -> int:
        return 4

    def draw(self, rows: int, generator: torch.Generator) -> Batch:
        return _to_say_again(self._places(rows, generator), self.length, self.vocab_size, generator)

    def _places(self, rows: int, generator: torch.Generator) -> Tensor:
        """Where the items stand, (B, items), in order."""
        return _distinct(rows, self.length, self.items, generator)


@dataclass(frozen=True, kw_only=True)
class Copying(SelectiveCopying):
    """Say the first tokens of a row again: as `SelectiveCopying`, but the items always stand at its beginning.

    Their distance from the answers is constant, so a convolution of that length is enough.

    Source: Arjovsky, Shah & Bengio, "Unitary Evolution Recurrent Neural Networks" (arXiv 1511.06464), section 4.1.
    """

    kind: ClassVar[str] = "copying"

    def _places(self, rows: int, generator: torch.Generator) -> Tensor:
        return torch.arange(self.items, device=generator.device).expand(rows, -1)


@dataclass(frozen=True, kw_only=True)
class InductionHeads(SyntheticTask):
    """Say what followed a token the last time it came, where that token, V - 1, comes twice.

    A row is random tokens below V - 1, with V - 1 once at a random place and again at the end, where the token that
    followed it the first time is due.

    Args:
        length: L of the whole row.
        vocab_size: V.

    Source: Gu & Dao (arXiv 2312.00752), section 4.1.2, and appendix E.1 for the settings.

    Example:
        >>> ids, targets, _ = InductionHeads(length=9, vocab_size=5).draw(1, generator_of(0, "cpu"))
        >>> first = ids[0].tolist().index(4)
        >>> targets[0, -1].item() == ids[0, first + 1].item(), ids[0, -1].item()
        (True, 4)
    """

    kind: ClassVar[str] = "induction_heads"

    length: int = 256
    vocab_size: int = 16

    @property
    def due(self) -> slice:
        return slice(self.length - 1, self.length)

    @property
    def _least_length(self) -> int:
        return 3

    @property
    def _least_vocabulary(self) -> int:
        return 3

    def draw(self, rows: int, generator: torch.Generator) -> Batch:
        asked = self.vocab_size - 1
        ids = _tokens((rows, self.length), 0, asked, generator)
        first = _tokens((rows, 1), 0, self.length - 2, generator)
        ids.scatter_(1, first, asked)
        ids[:, -1] = asked
        targets = torch.full_like(ids, IGNORE)
        targets[:, -1:] = ids.gather(1, first + 1)
        return Batch(ids, targets, None)


@dataclass(frozen=True, kw_only=True)
class MultiQueryRecall(SyntheticTask):
    """Say the value that belongs to a key, for many keys, of which each may come again at any place.

    A row begins with ``items`` pairs of a key (of 1 to V/2 - 1, each once) and a value (of V/2 to V - 1). After them
    each key comes once more, followed by noise (0); the gaps are drawn by a power law, so that most come soon. At a key
    that comes again its value is due.

    Args:
        length: L of the whole row, at least four times ``items``.
        vocab_size: V, even.
        items: how many pairs there are.
        power: the exponent α of the gaps' distribution: a place n has the weight α nᵅ⁻¹.

    Source: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (arXiv 2312.04927),
        section 3.

    Example:
        >>> ids, targets, _ = MultiQueryRecall(length=16, vocab_size=8, items=2).draw(1, generator_of(0, "cpu"))
        >>> pairs = dict(ids[0, :4].view(2, 2).tolist())
        >>> again = targets[0] != -100
        >>> [pairs[key] for key in ids[0, again].tolist()] == targets[0, again].tolist()
        True
    """

    kind: ClassVar[str] = "multi_query_recall"

    length: int = 256
    vocab_size: int = 8192
    items: int = 16
    power: float = 0.1

    def __post_init__(self) -> None:
        if self.items < 1 or not self.power > 0:
            raise UserError(f"{self.kind}: items and power must be above 0, got {self.items} and {self.power}")
        super().__post_init__()
        if self.vocab_size % 2:
            raise UserError(f"{self.kind}: vocab_size must be even (half are keys, half values), got {self.vocab_size}")

    @property
    def due(self) -> slice:
        return slice(2 * self.items, self.length)

    @property
    def _least_length(self) -> int:
        return 4 * self.items

    @property
    def _least_vocabulary(self) -> int:
        return 2 * (self.items + 1)

    def draw(self, rows: int, generator: torch.Generator) -> Batch:
        half, items, device = self.vocab_size // 2, self.items, generator.device
        keys = 1 + _distinct(rows, half - 1, items, generator, in_order=False)
        values = _tokens((rows, items), half, self.vocab_size, generator)
        ids = torch.zeros(rows, self.length, dtype=torch.int64, device=device)
        ids[:, : 2 * items] = torch.stack([keys, values], 2).flatten(1)
        slots = self.length // 2 - items  # of two tokens each
        weights = self.power * torch.arange(1, slots + 1, device=device, dtype=torch.float64) ** (self.power - 1)
        places = 2 * items + 2 * torch.multinomial(weights.expand(rows, -1), items, generator=generator)
        ids.scatter_(1, places, keys)
        targets = torch.full_like(ids, IGNORE).scatter_(1, places, values)
        return Batch(ids, targets, None)


_SEED_BITS, _STEP_BITS = 8, 23
"""With the purpose's one bit 32, as many as torch's generator for processors looks at."""

TASKS: dict[str, type[SyntheticTask]] = {
    task.kind: task for task in (SelectiveCopying, Copying, InductionHeads, MultiQueryRecall)
}
"""Every synthetic task by kind."""


def generator_of(seed: int, device: torch.device | str, *, step: int = 0, is_test: bool = False) -> torch.Generator:
    """The random numbers of one batch: another stream for each seed, step and purpose.

    So no row of a test is one of training, but for chance. The same numbers come on the same kind of device.

    Args:
        seed: from 0 to 255.
        device: where the rows are wanted.
        step: which batch, from 0 to 2²³ - 1.
        is_test: whether it is for testing.

    Raises:
        UserError: seed or step is out of its range.
    """
    for name, value, bits in (("seed", seed, _SEED_BITS), ("step", step, _STEP_BITS)):
        if not 0 <= value < 2**bits:
            raise UserError(f"{name} must be from 0 to {2**bits - 1}, got {value}")
    return torch.Generator(device).manual_seed((seed << _STEP_BITS | step) << 1 | is_test)


def _to_say_again(places: Tensor, length: int, vocab_size: int, generator: torch.Generator) -> Batch:
    """Rows with items at the given places (B, items) among noise, and the questions for them at the end."""
    items = _tokens(tuple(places.shape), 1, vocab_size - 1, generator)
    ids = torch.zeros(len(places), length, dtype=torch.int64, device=places.device).scatter_(1, places, items)
    targets = torch.cat([torch.full_like(ids, IGNORE), items], 1)
    return Batch(torch.cat([ids, torch.full_like(items, vocab_size - 1)], 1), targets, None)


def _tokens(shape: tuple[int, ...], start: int, end: int, generator: torch.Generator) -> Tensor:
    return torch.randint(start, end, shape, generator=generator, device=generator.device)


def _distinct(rows: int, below: int, count: int, generator: torch.Generator, *, in_order: bool = True) -> Tensor:
    """So many different numbers from 0 to `below` - 1 for each row, each set as likely as any other."""
    order = torch.rand(rows, below, generator=generator, device=generator.device, dtype=torch.float64)
    chosen = order.topk(count, dim=1).indices
    return chosen.sort(1).values if in_order else chosen
