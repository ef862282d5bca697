"""An engine that is asked for texts of any length: how fast, and whether its memory stays as it is."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch

from selective_ssm.bench import engines
from selective_ssm.bench.cases import Setup
from selective_ssm.bench.clock import quickest
from selective_ssm.bench.engines import Text
from selective_ssm.bench.gpu.cases import LoadCase, SoakCase
from selective_ssm.bench.gpu.writers import DTYPE
from selective_ssm.bench.run import Row, fresh
from selective_ssm.models import LanguageModel, preset

_PATIENCE = 1.0  # seconds; what takes longer is timed once


_STATIC = "static batch"


def ragged(case: LoadCase, setup: Setup) -> Iterator[Row]:
    """Texts through fewer slots than there are texts, beside the same texts in static batches.

    A static batch has a slot for each of its texts, reads their prompts in one pack, and goes on with each text for as
    many tokens as are wanted of it. There is one of all texts, and, for each number of slots, batches of so many texts,
    one after the other.
    """
    model = fresh(preset(case.preset), setup.device, DTYPE)
    wanted = texts(case, model.config.vocab_size)
    whole = sum(len(prompt) for prompt, _ in wanted)
    static = {_STATIC: len(wanted)} | {f"static batches of {slots}": slots for slots in case.slots}
    calls = {what: _in_batches(model, wanted, slots, whole) for what, slots in static.items()}
    for slots, budget in product(case.slots, case.budgets):
        engine = engines.ready(model, slots=slots, prefill_budget=budget)
        calls[f"engine, {slots} slots, reads {budget}"] = partial(engines.serve, engine, wanted)
    taken = quickest(calls, setup.device, rounds=setup.rounds, patience=_PATIENCE)
    tokens = sum(count for _, count in wanted)
    for what in calls:
        row: Row = {"case": case.name, "who": "ours", "what": what, "tokens a second": tokens / taken[what]}
        yield row | ({"of static": taken[_STATIC] / taken[what]} if what != _STATIC else {})


def soak(case: SoakCase, setup: Setup) -> Iterator[Row]:
    """The engine's memory after some steps, and after all that time allows, its slots never empty."""
    model = fresh(preset(case.preset), setup.device, DTYPE)
    wanted = texts(case, model.config.vocab_size)
    engine = engines.ready(model, slots=case.slots[0], prefill_budget=case.budgets[0])
    until = time.monotonic() + case.seconds
    steps = 0
    while steps < case.first or time.monotonic() < until:
        if engine.stats().queued < case.slots[0]:
            for prompt, count in wanted:
                engine.submit(prompt, max_new_tokens=count, **engines.GREEDY)
        engine.step()
        steps += 1
        if steps == case.first:
            yield _memory(case, steps, engine.stats().tokens, setup.device)
    yield _memory(case, steps, engine.stats().tokens, setup.device)


def texts(case: LoadCase, vocabulary: int) -> list[Text]:
    """The same texts each time."""
    drawn = random.Random(0)
    sizes = [(drawn.randint(*case.prompt), drawn.randint(*case.new_tokens)) for _ in range(case.texts)]
    return [([drawn.randrange(vocabulary) for _ in range(length)], count) for length, count in sizes]


def _in_batches(model: LanguageModel, wanted: Sequence[Text], size: int, tokens: int) -> Callable[[], None]:
    """Writes texts in batches of so many, of which each reads at most so many tokens, one after the other."""
    engine = engines.ready(model, slots=size, prefill_budget=tokens)

    def write() -> None:
        for first in range(0, len(wanted), size):
            engines.serve(engine, wanted[first : first + size])

    return write


def _memory(case: SoakCase, steps: int, tokens: int, device: torch.device) -> Row:
    row: Row = {"case": case.name, "who": "ours", "what": f"{steps} steps, {tokens} tokens"}
    if device.type != "cuda":
        return row
    torch.cuda.synchronize(device)
    used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return row | {"GiB": used / 2**30, "GiB reserved": reserved / 2**30}
