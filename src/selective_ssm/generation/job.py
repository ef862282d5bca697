"""What an engine knows of one text that it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from selective_ssm.errors import UserError
from selective_ssm.generation.bookmarks import Bookmark
from selective_ssm.generation.sampling import Needs, Sampling
from selective_ssm.generation.text import TextStream
from selective_ssm.models import ModelState

Finish = Literal["length", "end", "stop", "cancelled", "deadline"]
"""Why a text ended: all tokens are there · the tokenizer's end, or a stop id · a stop string · it was called off · its
time was up."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What is asked for beside a prompt, as `Engine.submit` takes it."""

    max_new_tokens: int
    stop: Sequence[str]
    stop_ids: Sequence[int]
    logprobs: bool
    deadline: float | None
    keep_state: bool
    sampling: Sampling

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens must be 0 or more, got {self.max_new_tokens}")
        if self.deadline is not None and not self.deadline >= 0:
            raise UserError(f"deadline must be 0 seconds or more, got {self.deadline}")


@dataclass(kw_only=True, eq=False)
class Job:
    """One text: what is asked for, how far it is, and what came of it.

    Attributes:
        wishes: what is asked for.
        prompt: the tokens to read before the answer.
        state: what the model has read before the prompt, of one slot; None is nothing.
        before: how many tokens that is.
        digests: after each token of the prompt, where states are kept by them.
        ends: the ids that end the text.
        text: what makes text of the tokens; None where ids are wanted.
        submitted: when, by the engine's clock.
        overdue: when it is to end with what is there.
        slot: where it is read and written.
        read: how many tokens of the prompt have been read.
        cached: how many of them had been read for another text.
        asked: how many tokens the device has been asked for.
        written: how many have come.
        ids: these tokens.
        logprobs: their log-probabilities, where they are wanted.
        pieces: the text that was made of them.
        bookmark: where to go on from, where it is wanted.
        error: what went wrong with this text alone, or with all at once.
        finish: why the text ended; set last of all.
    """

    wishes: Wishes
    prompt: list[int]
    state: ModelState | None
    before: int
    digests: list[bytes]
    ends: frozenset[int]
    text: TextStream | None
    submitted: float
    overdue: float
    slot: int = -1
    read: int = 0
    cached: int = 0
    asked: int = 0
    written: int = 0
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    pieces: list[str] = field(default_factory=list[str])
    bookmark: Bookmark | None = None
    error: BaseException | None = None
    finish: Finish | None = None
    _decoded: int = 0

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return self.finish is not None or self.error is not None

    @property
    def unread(self) -> int:
        """How many tokens of the prompt are to be read; the last one is left to the first step."""
        return len(self.prompt) - 1 - self.read

    @cached_property
    def needs(self) -> Needs:
        """The work that a step has with it."""
        return self.wishes.sampling.needs._replace(logprobs=self.wishes.logprobs)

    def take(self, token: int) -> Finish | None:
        """Take a token in, and say why it is the last one, if it is.

        It is made text at once only where a stop string may end the text: else whoever reads the text does it.
        """
        self.ids.append(token)
        self.written += 1
        if token in self.ends:
            return "end"
        if self.wishes.stop and self.text is not None:
            self.decode()
            if self.text.is_stopped:
                return "stop"
        return "length" if self.written >= self.wishes.max_new_tokens else None

    def decode(self, *, is_last: bool = False) -> None:
        """Make text of the tokens that are there; what ended the text is no part of it."""
        if self.text is None or self.error is not None:
            return
        try:
            for token in self.ids[self._decoded :]:
                self._decoded += 1
                if token not in self.ends:
                    self._say(self.text.feed(token))
            if is_last:
                self._say(self.text.rest())
        except Exception as error:  # its tokenizer's: other texts are none the worse
            self.error = error

    def forget(self) -> None:
        """Let go of the tokens that are there, once they have been given out."""
        self.ids.clear()
        self.logprobs.clear()
        self.pieces.clear()
        self._decoded = 0

    def _say(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
