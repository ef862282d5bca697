"""The engine's work: who gets a slot, who reads, who writes, and who is done."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from selective_ssm.generation import schedule
from selective_ssm.generation.bookmarks import Bookmark
from selective_ssm.generation.digest import extend
from selective_ssm.generation.flight import Flight
from selective_ssm.generation.graphs import Graphs
from selective_ssm.generation.job import Finish, Job
from selective_ssm.generation.prefixes import PrefixStore
from selective_ssm.generation.reads import Reads
from selective_ssm.generation.sampling import Needs
from selective_ssm.generation.slots import Beginning, Slots
from selective_ssm.generation.stats import Spans
from selective_ssm.generation.steps import Steps
from selective_ssm.models import LanguageModel
from selective_ssm.models.fingerprint import stamp


class _Batch(NamedTuple):
    """Texts that are written together, and their slots."""

    jobs: list[Job]
    rows: Tensor
    needs: Needs


class Loop:
    """Takes jobs from a queue through slots, a step at a time.

    A job waits in `queue`, gets a slot, is in `reading` until all of its prompt but the last token is read, and in
    `running` until it is done. Any thread may append to `called_off` what is to be ended.

    Args:
        model: what reads and writes.
        slots: where.
        graphs: what makes that quick.
        budget: the most tokens of prompts that a step reads.
        prefixes: where states of prompts are kept.
        runs_ahead: whether a step's tokens are looked at only when the next step is on its way.
        clock: seconds.
    """

    def __init__(
        self,
        model: LanguageModel,
        slots: Slots,
        graphs: Graphs | None,
        *,
        budget: int,
        prefixes: PrefixStore | None,
        runs_ahead: bool,
        clock: Callable[[], float],
    ) -> None:
        self._model, self._slots, self._graphs = model, slots, graphs
        self._reads, self._steps = Reads(model, slots, graphs), Steps(model, slots, graphs)
        self._budget, self._prefixes, self._runs_ahead, self._clock = budget, prefixes, runs_ahead, clock
        self._flight: Flight | None = None
        self._batch = _Batch([], torch.empty(0), Needs())
        self._looked = 0.0
        self._waited = 0
        self._earliest = math.inf
        self.free = list(range(slots.count))[::-1]
        self.queue: deque[Job] = deque()
        self.called_off: deque[Job] = deque()
        self.reading: list[Job] = []
        self.running: list[Job] = []
        self.tokens = 0
        self.to_first, self.between = Spans(), Spans()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self.queue or self.reading or self.running)

    def step(self) -> None:
        """Let go of what is over, fill free slots and read when it is time, write one token of every text."""
        try:
            self._let_go()
            if self._is_time_to_read():
                self._admit()
                self._read()
            self._write()
        except BaseException as error:
            self._give_up(error)
            raise

    def warm_up(self, needs: Needs) -> None:
        """Make the graphs there may be, for texts with such needs."""
        self._look_at_parameters()
        if self._graphs is not None:
            self._reads.warm_up(self._budget)
            self._steps.warm_up(needs)

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn."""
        self.queue.append(job)
        self._earliest = min(self._earliest, job.overdue)

    def _let_go(self) -> None:
        """End what was called off or is overdue."""
        while self.called_off:
            self._end(self.called_off.popleft(), "cancelled")
        now = self._clock()
        if now < self._earliest:
            return
        jobs = [*self.queue, *self.reading, *self.running]
        for job in jobs:
            if job.overdue <= now:
                self._end(job, "deadline")
        self._earliest = min((job.overdue for job in jobs if not job.is_done), default=math.inf)

    def _is_time_to_read(self) -> bool:
        waiting = [job.unread for job in (*self.reading, *islice(self.queue, len(self.free)))]
        is_time = schedule.is_time_to_read(waiting, self._budget, writing=len(self.running), waited=self._waited)
        self._waited = 0 if is_time or not waiting else self._waited + 1
        return is_time

    def _admit(self) -> None:
        """First come, first served."""
        if self.queue and not (self.reading or self.running):
            self._look_at_parameters()
        begun: list[Job] = []
        while self.queue and self.free and not self._is_being_read(self.queue[0]):
            self.reading.append(self.queue[0])  # before it is taken out: whatever fails, it hears of it
            begun.append(self.queue.popleft())
            begun[-1].slot = self.free.pop()
        if begun:
            self._slots.begin([self._beginning(job) for job in begun])
        for job in begun:
            if not job.unread:
                self._run(job)

    def _look_at_parameters(self) -> None:
        there = None if self._graphs is None and self._prefixes is None else stamp(self._model)
        for kept in (self._graphs, self._prefixes):
            if kept is not None:
                kept.keep_those_of(there)

    def _is_being_read(self, job: Job) -> bool:
        """Whether another job reads the same prompt just now: what it will leave is worth waiting for."""
        own = job.digests[-2:-1]
        return self._prefixes is not None and any(own == other.digests[-2:-1] for other in self.reading)

    def _beginning(self, job: Job) -> Beginning:
        state, job.state = job.state, None
        if self._prefixes is not None and (found := self._prefixes.find(job.digests[:-1])) is not None:
            job.read = job.cached = found.length
            state = found.state
        return Beginning(job.slot, state, job.prompt[-1], job.wishes.sampling, job.prompt)

    def _run(self, job: Job) -> None:
        self.running.append(job)
        self.reading.remove(job)
        if not job.wishes.max_new_tokens:
            self._end(job, "length")

    def _read(self) -> None:
        dealt = schedule.shares([job.unread for job in self.reading], self._budget)
        now_reading = [(job, count) for job, count in zip(self.reading, dealt, strict=True) if count]
        if not now_reading:
            return
        self._reads([(job.slot, job.prompt[job.read : job.read + count]) for job, count in now_reading])
        for job, count in now_reading:
            job.read += count
            if self._prefixes is not None:
                self._prefixes.put(job.digests[job.read - 1], self._slots.held(job.slot))
            if not job.unread:
                self._run(job)

    def _write(self) -> None:
        """Ask for the next token of each text, and look at those of the step before, or at once at these.

        What a bookmark is wanted of must not have been asked for a token too many.
        """
        asked = self._ask()
        before, self._flight = self._flight, None
        if before is not None:
            self._collect(before)
        if asked is not None and self._runs_ahead and not any(job.wishes.keep_state for job in self.running):
            self._flight = asked
        elif asked is not None:
            self._collect(asked)

    def _ask(self) -> Flight | None:
        jobs = [job for job in self.running if job.asked < job.wishes.max_new_tokens]
        if not jobs:
            return None
        if jobs != self._batch.jobs:
            rows = self._slots.rows([job.slot for job in jobs])
            self._batch = _Batch(jobs, rows, Needs.of_all(job.needs for job in jobs))
        tokens, logprobs = self._steps(self._batch.rows, self._batch.needs)
        for job in jobs:
            job.asked += 1
        return Flight(jobs, tokens, logprobs)

    def _collect(self, flight: Flight) -> None:
        """Give each text its token, but for those that have ended meanwhile."""
        tokens, logprobs = flight.land()
        now = self._clock()
        later = 0
        for row, job in enumerate(flight.jobs):
            if job.is_done:
                continue
            if job.written:
                later += 1
            else:
                self.to_first.add(now - job.submitted)
            if logprobs is not None and job.wishes.logprobs:
                job.logprobs.append(logprobs[row])
            finish = job.take(tokens[row])
            self.tokens += 1
            if finish is not None or job.error is not None:
                self._end(job, finish)
        self.between.add(now - self._looked, later)
        self._looked = now

    def _end(self, job: Job, finish: Finish | None) -> None:
        """Take a job out, wherever it is; why it ended is said last, when all else is there."""
        if job.finish is not None:
            return
        if job in self.running and job.wishes.keep_state and job.error is None:
            job.bookmark = self._bookmark(job)
        if job.wishes.stop:
            job.decode(is_last=True)
        for place in (self.queue, self.reading, self.running):
            if job in place:
                place.remove(job)
                if place is not self.queue:
                    self.free.append(job.slot)
        job.state = None
        job.finish = finish

    def _bookmark(self, job: Job) -> Bookmark:
        pending = job.ids[-1] if job.ids else job.prompt[-1]
        digest = [job.digests[-1], *extend(job.digests[-1], job.ids)][-1]
        return Bookmark(self._slots.held(job.slot), pending, digest, job.wishes.sampling.seed)

    def _give_up(self, error: BaseException) -> None:
        """The model failed, and with it all that was in its hands, or the next text: each failure ends one at least."""
        in_hand = [*self.reading, *self.running]
        if self.queue and not in_hand:
            in_hand.append(self.queue.popleft())
        for job in in_hand:
            job.error = error
        self.free = list(range(self._slots.count))[::-1]
        self.reading, self.running, self._flight = [], [], None
