"""Operators on a GPU: time beside floors, peers, and the speed of a copy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from selective_ssm.bench import cases
from selective_ssm.bench.cases import OpCase, Setup
from selective_ssm.bench.contenders import Call, Contender, kept_bytes, passes
from selective_ssm.bench.gpu import peers
from selective_ssm.bench.gpu.clock import host_seconds, time_of
from selective_ssm.bench.gpu.device import copy_bandwidth, exponentials_a_second
from selective_ssm.bench.run import Row, backends, leaves
from selective_ssm.ops import add_rms_norm, causal_conv1d, selective_scan, selective_scan_step

_MOST_FOR_REFERENCE = 2**23  # elements, beyond which plain torch takes seconds a call


def scan(case: OpCase, setup: Setup) -> Iterator[Row]:
    """The scan, forward and with its backward pass; what it keeps for the latter, also as a share of its output.

    Floors: memory, each tensor along the length read or written once (4 forward, 7 backward); exponentials, N + 4
    special functions an element, and as many again where the states are computed anew in the backward pass.
    """
    inputs = leaves(cases.scan_inputs(case, setup.device))
    options = cases.scan_options(case, setup.device)
    contenders = [
        Contender(backend, partial(selective_scan, **inputs, **options, backend=backend), list(inputs.values()))
        for backend in _fit(backends("selective_scan", case, setup.device), case)
    ]
    if "mamba_ssm" in setup.peers:
        contenders.append(peers.mamba_scan(inputs, case))
    tensor_bytes = case.elements * case.dtype.itemsize
    for one in contenders:
        for name, call in passes(one, "forward", "forward+backward"):
            row = {"case": case.name, "pass": name, "who": one.who} | timed(call, setup, one.note)
            if call is None:
                yield row
                continue
            tensors, rounds = (4, 1) if name == "forward" else (4 + 7, 2)
            row["memory floor µs"] = tensors * tensor_bytes / copy_bandwidth(setup.device) * 1e6
            if (rate := exponentials_a_second(setup.device)) is not None:
                row["exponentials floor µs"] = rounds * case.elements * (case.states + 4) / rate * 1e6
            if name != "forward":
                kept = kept_bytes(one)
                row |= {"kept MB": kept / 1e6, "kept of one tensor": kept / tensor_bytes}
            yield row


def conv(case: OpCase, setup: Setup) -> Iterator[Row]:
    """The convolution with SiLU, forward and backward, and what share it reaches of a copy's bandwidth."""
    inputs = leaves(cases.conv_inputs(case, setup.device))
    contenders = [
        Contender(backend, partial(causal_conv1d, **inputs, activation="silu", backend=backend), list(inputs.values()))
        for backend in backends("causal_conv1d", case, setup.device)
    ]
    if "mamba_ssm" in setup.peers:
        contenders.append(peers.mamba_conv(inputs))
    size = case.elements * case.dtype.itemsize
    yield from _shares(case, contenders, {"forward": 2 * size, "backward": 3 * size}, setup)


def norm(case: OpCase, setup: Setup) -> Iterator[Row]:
    """The add and the norm of an fp32 residual stream, likewise."""
    random = torch.Generator(setup.device).manual_seed(0)
    sizes = (case.batch, case.length, case.channels)
    x, residual = (torch.randn(*sizes, generator=random, device=setup.device) for _ in range(2))
    weight = torch.ones(case.channels, dtype=case.dtype, device=setup.device)
    inputs = leaves({"x": x.to(case.dtype), "residual": residual, "weight": weight})
    contenders = [
        Contender(backend, partial(add_rms_norm, **inputs, eps=1e-5, backend=backend), list(inputs.values()))
        for backend in backends("add_rms_norm", case, setup.device)
    ]
    low, wide = case.elements * case.dtype.itemsize, case.elements * residual.itemsize
    yield from _shares(case, contenders, {"forward": 2 * (low + wide), "backward": 2 * low + 3 * wide}, setup)


def step(case: OpCase, setup: Setup) -> Iterator[Row]:
    """One step of the scan, its time on the host beside that on the GPU."""
    inputs = cases.scan_inputs(case, setup.device)
    state = torch.zeros(case.batch, case.channels, case.states, device=setup.device)
    contenders = [
        Contender(backend, partial(selective_scan_step, state, **inputs, delta_softplus=True, backend=backend), [])
        for backend in backends("selective_scan_step", case, setup.device)
    ]
    if "mamba_ssm" in setup.peers:
        contenders.append(peers.mamba_step(state, inputs))
    for one in contenders:
        row = {"case": case.name, "who": one.who} | timed(one.call, setup, one.note)
        yield row if one.call is None else row | {"host µs": host_seconds(one.call, setup) * 1e6}


def timed(call: Call | None, setup: Setup, note: str = "") -> Row:
    """The columns of a call's time; of what cannot be called, why not."""
    if call is None:
        return {"note": note}
    time = time_of(call, setup)
    return {"gpu µs": time.gpu * 1e6, "wall µs": time.wall * 1e6}


def _shares(case: OpCase, contenders: list[Contender], moved: dict[str, int], setup: Setup) -> Iterator[Row]:
    """A row for each pass that moves so many bytes."""
    for one in contenders:
        for name, call in passes(one, *moved):
            row: Row = {"case": case.name, "pass": name, "who": one.who} | timed(call, setup, one.note)
            if call is not None:
                row["share of copy"] = moved[name] / (row["gpu µs"] / 1e6) / copy_bandwidth(setup.device)
            yield row


def _fit(names: list[str], case: OpCase) -> list[str]:
    return [name for name in names if name != "reference" or case.elements <= _MOST_FOR_REFERENCE]
