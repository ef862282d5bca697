"""An engine that is asked for texts of any length: how fast, and whether its memory stays as it is."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from selective_ssm.bench import engines
from selective_ssm.bench.cases import Setup
from selective_ssm.bench.clock import quickest
from selective_ssm.bench.engines import Text
from selective_ssm.bench.gpu.cases import LoadCase, SoakCase
from selective_ssm.bench.run import Row, fresh
from selective_ssm.models import LanguageModel, preset

_DTYPE = torch.bfloat16
_PATIENCE = 1.0  # seconds; what takes longer is timed once
_READ_AT_ONCE = 2**16  # tokens of prompts, by a static batch


def ragged(case: LoadCase, setup: Setup) -> Iterator[Row]:
    """Texts through an engine of as many slots as there are texts, or fewer, beside the same texts in static batches.

    A static batch has a slot for each of its texts, reads their prompts before it writes, and goes on with each text
    for as many tokens as are wanted of it. There is one of all texts, and, for each number of slots below, batches of
    so many texts, one after the other. An engine is gone before the next is made, since some fill a GPU.
    """
    model = fresh(preset(case.preset), setup.device, _DTYPE)
    wanted = texts(case, model.config.vocab_size)
    tokens = sum(count for _, count in wanted)

    def speed(call: Callable[[], None]) -> float:
        return tokens / quickest({"": call}, setup.device, rounds=setup.rounds, patience=_PATIENCE)[""]

    def row(what: str, found: float) -> Row:
        return {"case": case.name, "who": "ours", "what": what, "tokens a second": found, "of static": found / static}

    static = speed(_in_batches(model, wanted, len(wanted)))
    yield row("static batch", static)
    for slots in case.slots:
        if slots < len(wanted):
            yield row(f"static batches of {slots}", speed(_in_batches(model, wanted, slots)))
        for budget in case.budgets:
            yield row(f"engine, {slots} slots, reads {budget}", speed(_through(model, wanted, slots, budget)))


def soak(case: SoakCase, setup: Setup) -> Iterator[Row]:
    """The engine's memory after some steps, and after all that time allows, its slots never empty."""
    model = fresh(preset(case.preset), setup.device, _DTYPE)
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


def _through(model: LanguageModel, wanted: Sequence[Text], slots: int, budget: int) -> Callable[[], None]:
    """Asks an engine for all texts at once."""
    return partial(engines.serve, engines.ready(model, slots=slots, prefill_budget=budget), wanted)


def _in_batches(model: LanguageModel, wanted: Sequence[Text], size: int) -> Callable[[], None]:
    """Writes texts in batches of so many, one after the other."""
    engine = engines.ready(model, slots=size, prefill_budget=_READ_AT_ONCE)

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
