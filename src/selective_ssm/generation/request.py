"""A text that was asked for: to read as it comes, to wait for, or to call off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from selective_ssm.generation.bookmarks import Bookmark
from selective_ssm.generation.job import Finish, Job


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What was written after a prompt.

    Attributes:
        ids: all tokens that were written, the one that ended the text too.
        text: what they say, without a stop string or what ended the text; None where there is no tokenizer.
        logprobs: of each token, the natural logarithm of its probability by the model alone; None where not asked for.
        finish: why the text ended: "length", all tokens are there; "end", the tokenizer's end or a stop id; "stop", a
            stop string; "cancelled"; "deadline".
        prompt_tokens: how many tokens stood before the answer, those of a given state too.
        cached_tokens: how many of them were not read for it, as a state of them was there.
        state: where to go on from; None where not asked for, or where the prompt was not read to its end.
    """

    ids: list[int]
    text: str | None
    logprobs: list[float] | None
    finish: Finish
    prompt_tokens: int
    cached_tokens: int
    state: Bookmark | None


class Request:
    """One text of an engine. Reading it, waiting for its result or awaiting it keeps the engine going.

    Iterating gives pieces of text, or ids where there is no tokenizer, from the first one each time; no two threads may
    do so at once. What ended this text by going wrong is raised here, and nothing else. Awaiting steps in a thread of
    the engine's own; a wait that is cancelled, as by a time limit, calls the text off.
    """

    def __init__(
        self, job: Job, step: Callable[[], object], call_off: Callable[[Job], object], thread: Callable[[], Executor]
    ) -> None:
        self._job = job
        self._step, self._call_off, self._thread = step, call_off, thread
        self._is_text_whole = False

    def __repr__(self) -> str:
        job = self._job
        is_now = job.finish or ("failed" if job.error else "going on")
        return f"Request({job.before + len(job.prompt)} tokens, {len(job.ids)} written, {is_now})"

    def __iter__(self) -> Iterator[str] | Iterator[int]:
        """The pieces of text, or the ids, as soon as they are there."""
        return self.items()

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._awaited().__await__()

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return self._job.is_done

    def cancel(self) -> None:
        """Call the text off: at its next step the engine lets go of it. What is written stays."""
        self._call_off(self._job)

    def result(self) -> Completion:
        """Wait for the whole text.

        Raises:
            Exception: what went wrong with this text.
        """
        while not self._job.is_done:
            self._go_on()
        self._decode()
        job = self._job
        if job.error is not None:
            raise job.error
        assert job.finish is not None
        return Completion(
            ids=job.ids,
            text=None if job.text is None else "".join(job.pieces),
            logprobs=job.logprobs if job.wishes.logprobs else None,
            finish=job.finish,
            prompt_tokens=job.before + len(job.prompt),
            cached_tokens=job.before + job.cached,
            state=job.bookmark,
        )

    def items(self, *, forget: bool = False) -> Iterator[Any]:
        """What iterating gives.

        Args:
            forget: whether what was given is let go of, so that a text without end takes no memory; there is no
                result then. For a request that nobody else looks at.
        """
        job, given = self._job, 0
        while True:
            is_last = job.is_done  # asked before looking at what is there: another thread may write
            self._decode()
            new = (job.ids if job.text is None else job.pieces)[given:]
            yield from new
            given += len(new)
            if forget:
                job.forget()
                given = 0
            if is_last:
                break
            if not job.is_done:
                self._go_on()
        if job.error is not None:
            raise job.error

    def _go_on(self) -> None:
        """A step of the engine. What fails there is kept with the texts that it ended, and raised to who reads them."""
        with contextlib.suppress(Exception):
            self._step()

    def _decode(self) -> None:
        """Make text of the tokens that are there, where the engine had no need to."""
        job = self._job
        if job.wishes.stop or self._is_text_whole:
            return
        self._is_text_whole = job.is_done
        job.decode(is_last=self._is_text_whole)
        if job.error is not None:
            self._call_off(job)

    async def _awaited(self) -> Completion:
        loop = asyncio.get_running_loop()
        try:
            while not self._job.is_done:
                await loop.run_in_executor(self._thread(), self._go_on)
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self.result()
