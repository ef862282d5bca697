"""From a prompt and wishes to a job: what cannot be done is refused here, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index

from selective_ssm.data.tokenizers import Tokenizer
from selective_ssm.errors import UserError
from selective_ssm.generation.bookmarks import Bookmark
from selective_ssm.generation.digest import START, extend
from selective_ssm.generation.job import Job, Wishes
from selective_ssm.generation.slots import Slots
from selective_ssm.generation.text import TextStream
from selective_ssm.models import LanguageModelConfig


def job_of(
    prompt: str | Sequence[int],
    bookmark: Bookmark | None,
    wishes: Wishes,
    *,
    config: LanguageModelConfig,
    tokenizer: Tokenizer | None,
    slots: Slots,
    keeps_prefixes: bool,
    now: float,
) -> Job:
    """What an engine is to do.

    Args:
        prompt: text or ids.
        bookmark: what the prompt goes on from.
        wishes: what is asked for.
        config: of the model.
        tokenizer: the engine's.
        slots: the engine's.
        keeps_prefixes: whether the engine keeps states by what they have read.
        now: by the engine's clock.

    Raises:
        UserError: what `Engine.submit` says.
    """
    if tokenizer is None and (wishes.stop or isinstance(prompt, str)):
        raise UserError("text and stop strings need a tokenizer, and there is none: use token ids")
    new = _ids(prompt, tokenizer, begins=bookmark is None)
    ids = new if bookmark is None else [bookmark.pending, *new]
    if not ids:
        raise UserError("the prompt is empty: give at least one token")
    _check(ids, slots.known)
    state = None if bookmark is None else bookmark.state  # no copy: there may be as many texts as one likes
    if state is not None:
        slots.state.check(state, slots=1)
    before = 0 if state is None else int(state.position)
    length = before + len(ids) + wishes.max_new_tokens
    if config.max_positions is not None and length > config.max_positions:
        raise UserError(
            f"the model has {config.max_positions} positions, but prompt and answer would take {length}: "
            "shorten the prompt or max_new_tokens"
        )
    return Job(
        wishes=wishes,
        prompt=ids,
        state=state,
        before=before,
        digests=_digests(new, bookmark) if wishes.keep_state or keeps_prefixes else [],
        ends=frozenset(wishes.stop_ids if tokenizer is None else (*wishes.stop_ids, tokenizer.end)),
        text=None if tokenizer is None else TextStream(tokenizer, wishes.stop, after=ids[-1]),
        submitted=now,
        overdue=math.inf if wishes.deadline is None else now + wishes.deadline,
    )


def _ids(prompt: str | Sequence[int], tokenizer: Tokenizer | None, *, begins: bool) -> list[int]:
    if isinstance(prompt, str):
        assert tokenizer is not None
        return ([tokenizer.end] if begins else []) + tokenizer.encode(prompt)
    try:
        return [index(id) for id in prompt]
    except TypeError as error:
        raise UserError(f"a prompt of ids must be whole numbers: {error}") from error


def _check(ids: Sequence[int], known: int) -> None:
    """A vocabulary may be padded beyond its tokenizer's, which knows no text for the ids there."""
    if not 0 <= min(ids) <= max(ids) < known:
        outside = next(one for one in ids if not 0 <= one < known)
        raise UserError(f"token id {outside} is outside the vocabulary (0 to {known - 1})")


def _digests(new: Sequence[int], bookmark: Bookmark | None) -> list[bytes]:
    """After each token of the prompt, the pending one of a bookmark too."""
    return extend(START, new) if bookmark is None else [bookmark.digest, *extend(bookmark.digest, new)]
