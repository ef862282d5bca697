"""Time on the GPU itself, beside the time that passes for who waits and for who only calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from selective_ssm.bench.cases import Setup
from selective_ssm.bench.clock import seconds

Call = Callable[[], object]

_SECONDS = 0.2  # that one figure may take where more rounds than asked for fit
_PATIENCE = 2.0  # that the rounds asked for may take; slower calls are timed less often, once at least
_MOST = 50  # rounds
_FLUSH_BYTES = 2**28  # beyond any cache
_CYCLES_A_SECOND = 2e9


class Time(NamedTuple):
    """Medians, in seconds."""

    gpu: float
    """From the first of a call's kernels to the end of the last, with caches cold and no gap for want of orders."""
    wall: float
    """From the call to the end of the work that it starts."""


def time_of(call: Call, setup: Setup) -> Time:
    """Time a call that has run once; on a device without a clock of its own both figures are the wall's."""
    call()
    issued, wall = _issue(call, setup.device)
    rounds = max(1, min(setup.rounds, int(_PATIENCE / wall)), min(_MOST, int(_SECONDS / wall)))
    if rounds > 1:
        wall = statistics.median(seconds(call, setup.device) for _ in range(setup.rounds))
    if setup.device.type != "cuda":
        return Time(wall, wall)
    return Time(_on_gpu(call, setup.device, rounds, patience=2 * issued), wall)


def host_seconds(call: Call, setup: Setup, calls: int = 100) -> float:
    """Time until a call returns, without the work that it starts."""
    call()
    batches: list[float] = []
    for _ in range(setup.rounds):
        _wait_for(setup.device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        batches.append((time.perf_counter() - start) / calls)
    _wait_for(setup.device)
    return statistics.median(batches)


def _issue(call: Call, device: torch.device) -> tuple[float, float]:
    """Seconds until a call returns, and until its work is done."""
    _wait_for(device)
    start = time.perf_counter()
    call()
    issued = time.perf_counter() - start
    _wait_for(device)
    return issued, time.perf_counter() - start


def _on_gpu(call: Call, device: torch.device, rounds: int, patience: float) -> float:
    """In each round the GPU flushes its caches and idles, so that the host has issued the call before it begins."""
    with torch.cuda.device(device):
        flushed = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        for _ in range(rounds):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            torch.cuda._sleep(int(patience * _CYCLES_A_SECOND))  # pyright: ignore[reportPrivateUsage]
            before.record()
            call()
            after.record()
            events.append((before, after))
        _wait_for(device)
    return statistics.median(before.elapsed_time(after) for before, after in events) / 1e3


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
