"""How likely continuations are after their contexts; what several of the texts begin with is read only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.models import LanguageModel, ModelState


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model thinks of some continuations.

    Attributes:
        logprobs: of each one, Σ_t log p(token t | the context and the tokens before t), in nats.
        greedy: whether each of its tokens is the most likely one.
        tokens: how many tokens the model has read for all of them.
    """

    logprobs: list[float]
    greedy: list[bool]
    tokens: int


@torch.no_grad()
def score_continuations(
    model: LanguageModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    chunk: int = 2048,
    batch: int = 64,
    on_done: Callable[[int], object] | None = None,
) -> Scores:
    """Score each continuation after its context, in fp32 at least.

    What several of the texts begin with is read once, and the state after it goes on into each of them: the model reads
    as many tokens as a trie of all texts has nodes. Texts are packed end to end, so nothing is padded, and one that is
    longer than `chunk` is read in pieces, so that memory does not grow with it.

    Args:
        model: the language model, on any device.
        pairs: the ids of each context and of its continuation, at least one of each.
        chunk: how many tokens, of all texts together, are read at once.
        batch: how many texts are read side by side, each with a state of its own.
        on_done: called with the number of continuations that have been scored since the last call.

    Returns:
        The scores, in the order of the pairs; but for rounding they depend on no other pair, `chunk` or `batch`.

    Raises:
        UserError: a context or a continuation is empty, ids that the model does not know, or no chunk or batch.

    Example:
        >>> from selective_ssm.models import LanguageModelConfig
        >>> model = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16))
        >>> scores = score_continuations(model, [([1, 2, 3], [4, 5]), ([1, 2, 3], [4, 6]), ([1, 2, 3], [7])])
        >>> scores.tokens  # 1, 2, 3 and 4: the last token of a text is predicted, not read
        4
    """
    if chunk < 1 or batch < 1:
        raise UserError(f"chunk and batch must be 1 or more, got {chunk} and {batch}")
    if any(not context or not continuation for context, continuation in pairs):
        raise UserError("a context and its continuation must hold at least one token each")
    scorer = _Scorer(model, pairs, chunk, batch)
    for done in scorer.run():
        if on_done is not None:
            on_done(done)
    return Scores(logprobs=scorer.logprobs.tolist(), greedy=scorer.greedy.tolist(), tokens=scorer.tokens)


class _Branch(NamedTuple):
    """A piece that some texts share: tokens start … end − 1 of texts first … last − 1, to be read after a slot's."""

    first: int
    last: int
    start: int
    end: int
    slot: int


class _Text(NamedTuple):
    ids: list[int]
    predicted_from: int
    """The first token of the continuation."""
    owner: int
    """The place of its pair."""


class _Scorer:
    """Reads the trie of all texts from its root, a few branches at a time."""

    def __init__(
        self, model: LanguageModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], chunk: int, batch: int
    ) -> None:
        self._model, self._chunk, self._batch = model, chunk, batch
        self._device = model.embedding.weight.device
        texts = [_Text([*context, *after], len(context), place) for place, (context, after) in enumerate(pairs)]
        self._texts = sorted(texts, key=lambda text: text.ids[:-1])
        self.logprobs = torch.zeros(len(texts), dtype=torch.float64)
        self.greedy = torch.ones(len(texts), dtype=torch.bool)
        self.tokens = 0

    def run(self) -> Iterator[int]:
        """Read everything; how many texts have come to their end, after each pass of the model."""
        # Last in, first out: of what waits deeper in the trie there is never more than some branches a level.
        waiting: list[tuple[ModelState | None, list[_Branch]]] = []
        if roots := self._branches(0, len(self._texts), 0, 0):
            waiting.append((None, roots))
        while waiting:
            state, branches = waiting.pop()
            count = self._fitting(branches)
            now, later = branches[:count], branches[count:]
            if later:
                waiting.append((state, later))
            onward = [
                after for slot, one in enumerate(now) for after in self._branches(one.first, one.last, one.end, slot)
            ]
            before = None if state is None else state.select([one.slot for one in now])
            state = self._read(now, before, return_state=bool(onward))
            if onward:
                waiting.append((state, onward))
            yield sum(len(self._texts[row].ids) - 1 == one.end for one in now for row in range(one.first, one.last))

    def _branches(self, first: int, last: int, start: int, slot: int) -> list[_Branch]:
        """What follows where texts have been read up to `start`: a branch for each next token."""
        unread = (row for row in range(first, last) if len(self._texts[row].ids) - 1 > start)
        found: list[_Branch] = []
        for _, members in groupby(unread, key=lambda row: self._texts[row].ids[start]):
            rows = list(members)
            found.append(_Branch(rows[0], rows[-1] + 1, start, self._shared(rows[0], rows[-1], start), slot))
        return found

    def _shared(self, first: int, last: int, start: int) -> int:
        """The end of what texts have in common, or of what is read at once. As they are sorted, two of them tell."""
        one, other = self._texts[first].ids, self._texts[last].ids
        end = min(len(one) - 1, len(other) - 1, start + self._chunk)
        if first == last:
            return end
        return next((place for place in range(start, end) if one[place] != other[place]), end)

    def _fitting(self, branches: Sequence[_Branch]) -> int:
        """How many of the branches, one at least, are read at once."""
        tokens = 0
        for count, one in enumerate(branches[: self._batch]):
            tokens += one.end - one.start
            if count and tokens > self._chunk:
                return count
        return min(len(branches), self._batch)

    def _read(self, branches: Sequence[_Branch], state: ModelState | None, *, return_state: bool) -> ModelState | None:
        """Read branches, packed into one row, and score the tokens of continuations that follow in them."""
        ids: list[int] = []
        bounds = [0]
        predicted: list[tuple[int, int, int]] = []  # place in the row, the token after it, whose it is
        for one in branches:
            for text in self._texts[one.first : one.last]:
                places = range(max(one.start, text.predicted_from - 1), one.end)
                predicted += [(len(ids) + place - one.start, text.ids[place + 1], text.owner) for place in places]
            ids += self._texts[one.first].ids[one.start : one.end]
            bounds.append(len(ids))
        self.tokens += len(ids)
        places = torch.tensor([place for place, _, _ in predicted], dtype=torch.int64)
        logits_at, row = (one.to(self._device) for one in places.unique(return_inverse=True))
        output = self._model(
            self._tensor(ids)[None],
            state,
            cu_seqlens=self._tensor(bounds),
            return_state=return_state,
            logits_at=logits_at,
        )
        if predicted:
            targets = self._tensor([target for _, target, _ in predicted])
            self._add(output.logits[0], row, targets, torch.tensor([owner for _, _, owner in predicted]))
        return output.state

    def _add(self, logits: Tensor, row: Tensor, targets: Tensor, owners: Tensor) -> None:
        """Count what row[i] of the logits (n, V) says of targets[i] for the pair owners[i]."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        logprobs = wide[row, targets] - wide.logsumexp(-1)[row]
        missed = (wide.argmax(-1)[row] != targets).cpu()
        self.logprobs.index_add_(0, owners, logprobs.cpu().double())
        self.greedy[owners[missed]] = False

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)
