"""What a token costs on a GPU beside the bytes that it cannot do without, and what a copy of a state costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.bench import engines, writers
from selective_ssm.bench.cases import Setup
from selective_ssm.bench.clock import medians
from selective_ssm.bench.contenders import Call
from selective_ssm.bench.gpu.cases import DecodeCase, ForkCase
from selective_ssm.bench.gpu.clock import time_of
from selective_ssm.bench.gpu.device import copy_bandwidth
from selective_ssm.bench.run import Row, fresh, matrices
from selective_ssm.generation.graphs import Graph
from selective_ssm.generation.sampling import SamplingOptions
from selective_ssm.models import LanguageModel, preset
from selective_ssm.ops import linear

SAMPLING: Mapping[str, SamplingOptions] = {
    "greedy": engines.GREEDY,
    "temperature 1, top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
}
_DTYPE = torch.bfloat16
_TIMES = 100  # in a row, as steps follow each other: their mean is told
_THEIR_TOKENS = 101


def decode(case: DecodeCase | ForkCase, setup: Setup) -> Iterator[Row]:
    """A token of every text, or a fork."""
    yield from _forks(case, setup) if isinstance(case, ForkCase) else _steps(case, setup)


def _steps(case: DecodeCase, setup: Setup) -> Iterator[Row]:
    """Steps of an engine whose slots are all in use, and what they consist of.

    The matrix products alone run in one graph, as ours (`ops.linear`) and as torch's. The states' traffic is what it
    takes to copy as many bytes as are read and written; "the rest" is what a greedy step has beside ours of the former
    and the latter. The floor is the states' traffic, and all parameters read once at the same speed.
    """
    config = preset(case.preset)
    model = fresh(config, setup.device, _DTYPE)
    busy = {name: engines.busy(model, case.batch, options) for name, options in SAMPLING.items()}
    weights = matrices(model)
    plain = {  # kept as long as the graphs, which do not keep what they read
        "matrix products": products(weights, case.batch, linear),
        "matrix products of torch": products(weights, case.batch, F.linear),
    }
    calls = {name: engine.step for name, engine in busy.items()}
    calls |= {name: _captured(call, setup.device) for name, call in plain.items()}
    often = {name: partial(_often, call) for name, call in calls.items()}
    taken = {name: time / _TIMES for name, time in medians(often, setup.device, rounds=setup.rounds).items()}
    bandwidth = copy_bandwidth(setup.device)
    taken["states"] = 2 * case.batch * model.init_state(1).nbytes / bandwidth
    taken["the rest"] = taken["greedy"] - taken["matrix products"] - taken["states"]
    taken["floor"] = taken["states"] + sum(parameter.nbytes for parameter in model.parameters()) / bandwidth
    for what, time in taken.items():
        row: Row = {"case": case.name, "who": "ours", "what": what, "ms": time * 1e3}
        yield row | ({"of floor": time / taken["floor"], "a state": _dtypes(model)} if what in SAMPLING else {})
    if "mamba_ssm" in setup.peers:
        yield _their_step(case, taken["floor"], setup)


def products(weights: list[Tensor], batch: int, apply: Callable[[Tensor, Tensor], Tensor]) -> Call:
    """A token's matrix products alone, one after the other."""
    inputs = {
        width: torch.randn(batch, width, device=weights[0].device).to(weights[0].dtype)
        for width in {weight.shape[1] for weight in weights}
    }

    @torch.no_grad()
    def call() -> None:
        for weight in weights:
            apply(inputs[weight.shape[1]], weight)

    return call


def _captured(call: Call, device: torch.device) -> Call:
    return Graph(call, (), device) if device.type == "cuda" else call


def _often(call: Call) -> None:
    for _ in range(_TIMES):
        call()


def _dtypes(model: LanguageModel) -> str:
    """The memory of a text's state by its dtype."""
    tensors = {name: one for name, one in model.init_state(1).tensors().items() if name != "position"}
    return ", ".join(f"{name} {one.nbytes / 1e6:.2f} MB" for name, one in tensors.items())


def _their_step(case: DecodeCase, floor: float, setup: Setup) -> Row:
    """The time of a token after the first, as mamba_ssm writes it."""
    row: Row = {"case": case.name, "who": "mamba_ssm", "what": "greedy"}
    one = writers.released(preset(case.preset), setup.device, _DTYPE)
    if one.call is None:
        return row | {"note": one.note}
    writer: writers.Writer = one.call()
    writer.take(torch.zeros(case.batch, 1, dtype=torch.int64, device=setup.device), _THEIR_TOKENS)
    calls = {count: partial(writer.write, count) for count in (1, _THEIR_TOKENS)}
    first, whole = medians(calls, setup.device, rounds=setup.rounds).values()
    time = (whole - first) / (_THEIR_TOKENS - 1)
    return row | {"ms": time * 1e3, "of floor": time / floor, "a state": "all bfloat16"}


def _forks(case: ForkCase, setup: Setup) -> Iterator[Row]:
    """Copies of one state, by the time until they are there ("ms") and by the GPU's own, beside a plain copy's."""
    state = fresh(preset(case.preset), setup.device, _DTYPE).init_state(1)
    rows = {count: torch.zeros(count, dtype=torch.int64, device=setup.device) for count in case.copies}
    calls: dict[str, tuple[int, Call]] = {"clone": (1, state.clone)}
    calls |= {f"select {count}": (count, partial(state.select, index)) for count, index in rows.items()}
    for what, (count, call) in calls.items():
        time = time_of(call, setup)
        floor = (1 + count) * state.nbytes / copy_bandwidth(setup.device)
        row: Row = {"case": case.name, "who": "ours", "what": what, "ms": time.wall * 1e3, "gpu ms": time.gpu * 1e3}
        yield row | {"floor ms": floor * 1e3}
