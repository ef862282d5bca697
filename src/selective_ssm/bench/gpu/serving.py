"""An engine that is asked for texts of any length: how fast, and whether its memory stays as it is."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import partial

import torch

from selective_ssm.bench import engines
from selective_ssm.bench.cases import Setup
from selective_ssm.bench.clock import quickest
from selective_ssm.bench.engines import Text
from selective_ssm.bench.gpu.cases import LoadCase, SoakCase
from selective_ssm.bench.gpu.writers import DTYPE
from selective_ssm.bench.run import Row, fresh
from selective_ssm.models import preset

_PATIENCE = 1.0  # seconds; what takes longer is timed once


def ragged(case: LoadCase, setup: Setup) -> Iterator[Row]:
    """Texts through fewer slots than there are texts, beside the same texts in one static batch.

    The static batch has a slot for every text, reads all prompts in one pack, and goes on with each text for as many
    tokens as are wanted of it.
    """
    model = fresh(preset(case.preset), setup.device, DTYPE)
    wanted = texts(case, model.config.vocab_size)
    whole = sum(len(prompt) for prompt, _ in wanted)
    layouts = {"static batch": (len(wanted), whole)}
    layouts |= {f"engine, {case.slots} slots, reads {budget}": (case.slots, budget) for budget in case.budgets}
    calls = {
        what: partial(engines.serve, engines.ready(model, slots=slots, prefill_budget=budget), wanted)
        for what, (slots, budget) in layouts.items()
    }
    taken = quickest(calls, setup.device, rounds=setup.rounds, patience=_PATIENCE)
    tokens = sum(count for _, count in wanted)
    for what in calls:
        row: Row = {"case": case.name, "who": "ours", "what": what, "tokens a second": tokens / taken[what]}
        yield row | ({"of static": taken["static batch"] / taken[what]} if what != "static batch" else {})


def soak(case: SoakCase, setup: Setup) -> Iterator[Row]:
    """The engine's memory after some steps, and after all that time allows, its slots never empty."""
    model = fresh(preset(case.preset), setup.device, DTYPE)
    wanted = texts(case, model.config.vocab_size)
    engine = engines.ready(model, slots=case.slots, prefill_budget=case.budgets[0])
    until = time.monotonic() + case.seconds
    steps = 0
    while steps < case.first or time.monotonic() < until:
        if engine.stats().queued < case.slots:
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


def _memory(case: SoakCase, steps: int, tokens: int, device: torch.device) -> Row:
    row: Row = {"case": case.name, "who": "ours", "what": f"{steps} steps, {tokens} tokens"}
    if device.type != "cuda":
        return row
    torch.cuda.synchronize(device)
    used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return row | {"GiB": used / 2**30, "GiB reserved": reserved / 2**30}
