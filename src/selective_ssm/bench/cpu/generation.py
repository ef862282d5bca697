"""Writing texts side by side on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from selective_ssm.bench import engines
from selective_ssm.bench.cases import Setup
from selective_ssm.bench.clock import quickest
from selective_ssm.bench.cpu import floors
from selective_ssm.bench.cpu.cases import DecodeCase
from selective_ssm.bench.run import Row, fresh
from selective_ssm.models import LanguageModel, preset

Calls = dict[tuple[str, int], Callable[[], object]]

_MANY = 10  # times as many rounds for one token
_FIRST_STEPS = 3  # until they run from a recording


def decode(case: DecodeCase, setup: Setup) -> Iterator[Row]:
    """A token of every text, by an engine and by the model's step alone, beside all parameters read once.

    "of batch 1" is tokens a second beside those of a single text.
    """
    model = fresh(preset(case.preset), setup.device, torch.float32)
    calls: Calls = {("floor", 1): floors.reading(model)}
    for batch in case.batches:
        calls["engine", batch] = engines.busy(model, batch, engines.GREEDY).step
        calls["step", batch] = _step(model, batch)
    taken = quickest(calls, setup.device, rounds=_MANY * setup.rounds)
    floor = taken.pop(("floor", 1))
    yield {"case": case.name, "who": "floor", "ms": floor * 1e3}
    for (who, batch), time in taken.items():
        row: Row = {"case": case.name, "who": who, "batch": batch, "ms": time * 1e3, "of floor": time / floor}
        row["tokens a second"] = batch / time
        yield row | {"of batch 1": row["tokens a second"] * taken[who, 1]}


def _step(model: LanguageModel, batch: int) -> Callable[[], object]:
    """The model's step from a state of so many slots, without a choice of tokens."""
    ids, state = torch.zeros(batch, dtype=torch.int64), model.init_state(batch)

    def step() -> None:
        model.step(ids, state)

    for _ in range(_FIRST_STEPS):
        step()
    return step
