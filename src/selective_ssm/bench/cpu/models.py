"""Whole models on a CPU: each task beside the part of it that nothing can spare."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from selective_ssm.bench.cases import Setup
from selective_ssm.bench.clock import quickest
from selective_ssm.bench.cpu import floors, peers
from selective_ssm.bench.cpu.cases import TaskCase
from selective_ssm.bench.run import Row, matrices, read, train
from selective_ssm.models import LanguageModel, ModelState, preset
from selective_ssm.training.optimizer import OptimizerConfig, adamw

_PATIENCE = 20.0  # seconds; what takes longer is timed once
_MANY = 10  # times as many rounds for one token


def model(case: TaskCase, setup: Setup) -> Iterator[Row]:
    """A task, ours beside its floor; in some cases the reference and peers too.

    Floors: of prefill and training the model's matrix products alone, of decoding the weights read once, of an update
    the fused optimizer alone.
    """
    config = preset(case.preset)
    ours = LanguageModel(config).to(case.dtype)
    ids = torch.randint(config.vocab_size, (case.batch, case.length))
    calls = _TASKS[case.task](ours, ids)
    if case.with_peers:
        plain = copy.deepcopy(ours)  # what a model has prepared for its steps is of one backend
        calls["reference"] = partial(_with_reference, _TASKS[case.task](plain, ids)["ours"])
    others = list(peers.transformers_models(case, config, setup.peers)) if case.with_peers else []
    calls |= {one.who: one.call for one in others if one.call is not None}
    rounds = setup.rounds * (_MANY if case.task == "decode" else 1)
    taken = quickest(calls, setup.device, rounds=rounds, patience=_PATIENCE)
    tokens = {"prefill": ids.numel(), "training": ids.numel(), "decode": case.batch, "update": 0}[case.task]
    for who in calls:
        row: Row = {"case": case.name, "who": who, "ms": taken[who] * 1e3, "of floor": taken[who] / taken["floor"]}
        yield row | ({"tokens a second": tokens / taken[who]} if tokens and who != "floor" else {})
    yield from ({"case": case.name, "who": one.who, "note": one.note} for one in others if one.call is None)


Calls = dict[str, Callable[[], object]]


def _prefill(ours: LanguageModel, ids: Tensor) -> Calls:
    return {"floor": floors.products(matrices(ours), ids.numel()), "ours": partial(read, ours, ids)}


def _training(ours: LanguageModel, ids: Tensor) -> Calls:
    floor = floors.products_with_gradients(matrices(ours), ids.numel())
    return {"floor": floor, "ours": partial(train, ours, ids)}


def _decode(ours: LanguageModel, ids: Tensor) -> Calls:
    with torch.no_grad():
        logits, state = ours.prefill(ids)

    def write() -> None:
        nonlocal logits, state
        assert isinstance(state, ModelState)
        logits, state = ours.step(logits.argmax(dim=-1), state)

    return {"floor": floors.reading(ours), "ours": write}


def _update(ours: LanguageModel, ids: Tensor) -> Calls:
    config = OptimizerConfig()
    optimizer = adamw(ours, config, fused=True)
    train(ours, ids)
    assert config.clip is not None
    norm = config.clip

    def clipped() -> None:
        nn.utils.clip_grad_norm_(ours.parameters(), norm)
        optimizer.step()

    return {"floor": optimizer.step, "ours": clipped}


_TASKS: dict[str, Callable[[LanguageModel, Tensor], Calls]] = {
    "prefill": _prefill,
    "decode": _decode,
    "training": _training,
    "update": _update,
}


def _with_reference(call: Callable[[], object]) -> None:
    """Run a call with plain torch's operators."""
    before = os.environ.get("SELECTIVE_SSM_BACKEND")
    os.environ["SELECTIVE_SSM_BACKEND"] = "reference"
    try:
        call()
    finally:
        if before is None:
            del os.environ["SELECTIVE_SSM_BACKEND"]
        else:
            os.environ["SELECTIVE_SSM_BACKEND"] = before
