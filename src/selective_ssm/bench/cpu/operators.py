"""Operators on a CPU: time beside floors and the reference.

Legend: B batch, L length, D channels, N state.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from selective_ssm.bench import cases
from selective_ssm.bench.cases import OpCase, Setup
from selective_ssm.bench.clock import quickest
from selective_ssm.bench.contenders import Contender, passes
from selective_ssm.bench.cpu import peers
from selective_ssm.bench.cpu.floors import Exponentials
from selective_ssm.bench.cpu.memory import Allocated
from selective_ssm.bench.loop import scan_loop
from selective_ssm.bench.run import Row, backends, leaves
from selective_ssm.ops import causal_conv1d, selective_scan, selective_scan_step
from selective_ssm.ops.selective_scan import cpu
from selective_ssm.ops.selective_scan.inputs import Inputs, Options

_PASSES = ("forward", "backward")


def scan(case: OpCase, setup: Setup) -> Iterator[Row]:
    """The scan forward, beside its floor, and backward, beside its forward; on one thread, and on all there are.

    "memory" is what the kernels' two passes allocate beyond output and gradients, on all threads, as a share of one
    (B, L, D) tensor of fp32.
    """
    inputs = leaves(cases.scan_inputs(case, setup.device))
    contenders = [
        Contender(name, partial(selective_scan, **inputs, delta_softplus=True, backend=name), list(inputs.values()))
        for name in backends("selective_scan", case, setup.device)
    ]
    if case.against_loop:
        contenders.append(Contender("loop", partial(scan_loop, **inputs), list(inputs.values())))
    if "mambapy" in setup.peers:
        contenders.append(peers.mambapy_scan(inputs))
    floor = Exponentials(case)
    memory = {one.who: _memory(inputs, case) for one in contenders if one.who == "cpu"}
    for threads in dict.fromkeys((1, torch.get_num_threads())):
        with _threads(threads):
            calls = _calls(contenders)
            taken = quickest(calls | (floor.calls() if threads == 1 else {}), setup.device, rounds=setup.rounds)
        common: Row = {"case": case.name, "threads": threads}
        least = floor.seconds(taken) if threads == 1 else None
        if least is not None:
            yield common | {"pass": "forward", "who": "floor", "ms": least * 1e3}
        yield from _rows(common, contenders, taken, least, memory)


def conv(case: OpCase, setup: Setup) -> Iterator[Row]:
    """The convolution with SiLU, forward and backward, beside a copy of what is convolved."""
    inputs = leaves(cases.conv_inputs(case, setup.device))
    contenders = [
        Contender(name, partial(causal_conv1d, **inputs, activation="silu", backend=name), list(inputs.values()))
        for name in backends("causal_conv1d", case, setup.device)
    ]
    source, target = (torch.zeros_like(inputs["x"]) for _ in range(2))
    for threads in dict.fromkeys((1, torch.get_num_threads())):
        with _threads(threads):
            calls = _calls(contenders) | {"floor": partial(target.copy_, source)}
            taken = quickest(calls, setup.device, rounds=setup.rounds)
        common: Row = {"case": case.name, "threads": threads}
        yield common | {"pass": "forward", "who": "floor", "ms": taken["floor"] * 1e3}
        yield from _rows(common, contenders, taken, taken["floor"], {})


def step(case: OpCase, setup: Setup) -> Iterator[Row]:
    """One step of the scan, beside one operation of torch that reads and writes the state."""
    inputs = cases.scan_inputs(case, setup.device)
    state = torch.zeros(case.batch, case.channels, case.states, device=setup.device)
    calls: dict[str, Callable[[], object]] = {"floor": partial(state.mul_, 0.5)}
    for name in backends("selective_scan_step", case, setup.device):
        calls[name] = partial(selective_scan_step, state, **inputs, delta_softplus=True, backend=name)
    taken = quickest(calls, setup.device, rounds=20 * setup.rounds)
    for who in calls:
        yield {"case": case.name, "who": who, "µs": taken[who] * 1e6, "of floor": taken[who] / taken["floor"]}


def _calls(contenders: list[Contender]) -> dict[str, Callable[[], object]]:
    """Each contender's passes, by both names."""
    return {f"{one.who} {name}": call for one in contenders for name, call in passes(one, *_PASSES) if call is not None}


def _rows(
    common: Row, contenders: list[Contender], taken: dict[str, float], floor: float | None, memory: dict[str, float]
) -> Iterator[Row]:
    """A row for each contender and pass: forward compared with the floor, backward with forward."""
    for one in contenders:
        if one.call is None:
            yield common | {"who": one.who, "note": one.note}
            continue
        forward, backward = (taken[f"{one.who} {name}"] for name in _PASSES)
        row = common | {"pass": "forward", "who": one.who, "ms": forward * 1e3}
        yield row if floor is None else row | {"of floor": forward / floor}
        row = common | {"pass": "backward", "who": one.who, "ms": backward * 1e3, "of forward": backward / forward}
        yield row | ({"memory": memory[one.who]} if one.who in memory else {})


def _memory(inputs: Mapping[str, Tensor], case: OpCase) -> float:
    """Bytes that the kernels' two passes allocate beyond output and gradients, as a share of one fp32 sequence."""
    given = Inputs(**{name: tensor.detach() for name, tensor in inputs.items()}, initial_state=None, cu_seqlens=None)
    options = Options(True, False, "euler")
    slope = torch.ones_like(given.u)
    with Allocated() as allocated:
        out, final, kept = cpu.forward(given, options, True)
        assert kept is not None
        gradients = cpu.backward(slope, None, kept, given, options)
    own = [one for one in (*given, slope, out, final, *gradients) if one is not None]
    return allocated.beyond(own) / (4 * case.elements)


@contextmanager
def _threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
