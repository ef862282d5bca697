"""Many texts written side by side: they come and go while the others are written on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

from selective_ssm.data.tokenizers import Tokenizer
from selective_ssm.errors import UserError
from selective_ssm.generation.bookmarks import Bookmark
from selective_ssm.generation.graphs import Graphs
from selective_ssm.generation.job import Wishes
from selective_ssm.generation.loop import Loop
from selective_ssm.generation.prefixes import PrefixStore
from selective_ssm.generation.request import Request
from selective_ssm.generation.sampling import Sampling, SamplingOptions
from selective_ssm.generation.slots import Slots, untracked
from selective_ssm.generation.stats import Stats
from selective_ssm.generation.submission import job_of
from selective_ssm.models import LanguageModel

if TYPE_CHECKING:
    from typing_extensions import Unpack


class QueueFull(UserError):
    """No more texts are taken now: try again when some are done."""


class Engine:
    """Writes many texts at once with one model, in the memory of so many states.

    Any thread may submit and step; one step runs at a time. Nothing happens but in `step`, which reading a `Request`,
    waiting for it or awaiting it calls too.

    Args:
        model: the language model, on any device.
        tokenizer: the one that it was trained with; without it prompts and answers are ids.
        slots: how many texts are read and written side by side.
        prefill_budget: the most tokens of prompts that a step reads, so that texts which are written never stall. Where
            less is to be read while more texts are written, it may wait for a few steps to be read with others.
        max_queue: the most texts that wait for a slot; None is any number.
        prefix_bytes: memory for states of prompts that were read; prompts that begin alike go on from them. They are
            let go of when parameters have changed while nothing was to do.
        run_ahead: whether a step's tokens are looked at only when the next step is on its way, so that the device does
            not wait for the host; by default on a GPU.
        graphs: whether steps and reads run from CUDA graphs; by default on a GPU. One is made when a step first has so
            many texts with such settings, or a read so much to read (see `warm_up`), and all anew when parameters have
            changed while nothing was to do.
        clock: seconds, for deadlines and the counters.

    Raises:
        UserError: an argument out of its range, a tokenizer that does not fit the model, or a model whose state grows
            with the text.

    Example:
        >>> from selective_ssm.models import LanguageModelConfig
        >>> model = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16))
        >>> engine = Engine(model, slots=2)
        >>> requests = [engine.submit([1, 2, 3], max_new_tokens=n) for n in (2, 5, 3)]
        >>> [len(request.result().ids) for request in requests]
        [2, 5, 3]
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 16,
        prefill_budget: int = 2048,
        max_queue: int | None = None,
        prefix_bytes: int = 0,
        run_ahead: bool | None = None,
        graphs: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        known = _known_ids(model, tokenizer)
        least = {"slots": (slots, 1), "prefill_budget": (prefill_budget, 1), "prefix_bytes": (prefix_bytes, 0)}
        for name, (value, bound) in {**least, "max_queue": (max_queue, 0)}.items():
            if value is not None and value < bound:
                raise UserError(f"{name} must be {bound} or more, got {value}")
        if model.backbone.state_grows:
            raise UserError(
                "the model's state grows with the text, and an engine's slots do not; write with model.step instead, "
                "from model.init_state(batch, max_length), which makes room beforehand"
            )
        self._config, self._tokenizer = model.config, tokenizer
        self._max_queue, self._clock = max_queue, clock
        self._lock = threading.RLock()
        self._busy = 0.0
        self._prefixes = PrefixStore(prefix_bytes) if prefix_bytes else None
        is_on_gpu = model.embedding.weight.is_cuda
        if graphs and not is_on_gpu:
            raise UserError("graphs are made on a GPU only, and the model is not on one: leave them out")
        with untracked():
            self._slots = Slots(model, slots, known)
        uses_graphs = is_on_gpu if graphs is None else graphs
        self._loop = Loop(
            model,
            self._slots,
            Graphs(model) if uses_graphs else None,
            budget=prefill_budget,
            prefixes=self._prefixes,
            runs_ahead=is_on_gpu if run_ahead is None else run_ahead,
            clock=clock,
        )

    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        logprobs: bool = False,
        deadline: float | None = None,
        keep_state: bool = False,
        state: Bookmark | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Request:
        """Ask for a text.

        A prompt of text is read as the beginning of a document (an empty one too: the tokenizer's ``end``, with which
        documents begin, goes before it), or as the continuation of what `state` has read. To ids nothing is added.

        Args:
            prompt: text, where there is a tokenizer, or ids; either may be empty after a `state`.
            max_new_tokens: the most tokens to write; with 0 the prompt is read only.
            stop: strings that end the text, and are left out of it.
            stop_ids: ids that end it, as the tokenizer's ``end`` does.
            logprobs: whether the tokens' log-probabilities are wanted.
            deadline: seconds from now, after which the text ends with what is there.
            keep_state: whether a bookmark is wanted, to go on from the text's end.
            state: where another text stopped, to go on from there; it is left as it is, and may be used again, but is
                not to be stepped before the text has a slot. A repetition penalty counts nothing that it has read.
            sampling: as `Sampling` takes it; the seed is by default that of `state`.

        Raises:
            QueueFull: too many texts wait.
            UserError: a prompt that is empty or has ids outside the vocabulary, text without a tokenizer, a text longer
                than the model's positions, a state of another model, or a setting out of its range.
        """
        if state is not None:
            sampling.setdefault("seed", state.seed)
        wishes = Wishes(
            max_new_tokens=max_new_tokens,
            stop=(stop,) if isinstance(stop, str) else stop,
            stop_ids=stop_ids,
            logprobs=logprobs,
            deadline=deadline,
            keep_state=keep_state,
            sampling=Sampling(**sampling),
        )
        with untracked():
            job = job_of(
                prompt,
                state,
                wishes,
                config=self._config,
                tokenizer=self._tokenizer,
                slots=self._slots,
                keeps_prefixes=self._prefixes is not None,
                now=self._clock(),
            )
        with self._lock:
            waiting = len(self._loop.queue) - len(self._loop.free)  # those that no slot is there for
            if self._max_queue is not None and waiting >= self._max_queue:
                raise QueueFull(f"{waiting} texts wait already, and no more may: try again when some are done")
            self._loop.submit(job)
        return Request(job, self.step, self._loop.called_off.append, lambda: self._thread)

    def warm_up(self, *, logprobs: bool = False, **sampling: Unpack[SamplingOptions]) -> None:
        """Make the CUDA graphs for texts with such settings now, so that the first ones do not wait for them.

        Args:
            logprobs: as in `submit`.
            sampling: as in `submit`.
        """
        with self._lock, untracked():
            self._loop.warm_up(Sampling(**sampling).needs._replace(logprobs=logprobs))

    def step(self) -> bool:
        """Read some tokens of the prompts, and write one token of every text whose prompt is read.

        Returns:
            Whether anything is left to do.

        Raises:
            Exception: what the model raised; the texts that were being read and written are over, and raise it too.
        """
        with self._lock, untracked():
            began = self._clock()
            self._loop.step()
            self._busy += self._clock() - began
            return not self._loop.is_idle

    def run(self) -> None:
        """Step until nothing is left."""
        while self.step():
            pass

    def stats(self) -> Stats:
        """The counters as they are now."""
        with self._lock:
            loop = self._loop
            return Stats(
                queued=len(loop.queue),
                reading=len(loop.reading),
                running=len(loop.running),
                free_slots=len(loop.free),
                tokens=loop.tokens,
                tokens_per_second=loop.tokens / self._busy if self._busy else 0.0,
                first_token_mean=loop.to_first.mean,
                first_token_max=loop.to_first.longest,
                between_tokens_mean=loop.between.mean,
                between_tokens_max=loop.between.longest,
                prefix_hits=0 if self._prefixes is None else self._prefixes.hits,
                prefix_misses=0 if self._prefixes is None else self._prefixes.misses,
            )

    @cached_property
    def _thread(self) -> Executor:
        """Where steps run while somebody awaits a text: one thread, since more would fight over the same cores."""
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")


def _known_ids(model: LanguageModel, tokenizer: Tokenizer | None) -> int:
    """How many ids may be written: a model's vocabulary may be padded beyond its tokenizer's."""
    vocabulary = model.config.vocab_size
    known = vocabulary if tokenizer is None else tokenizer.vocab_size
    if known > vocabulary:
        raise UserError(f"the tokenizer has {known} ids, but the model knows only {vocabulary}")
    return known
