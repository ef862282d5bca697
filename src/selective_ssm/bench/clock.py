"""Timing calls, on the CPU and where calls return before the work is done."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def medians(calls: Mapping[Name, Callable[[], object]], device: torch.device, *, rounds: int) -> dict[Name, float]:
    """Time calls in turns, so that all of them meet the same disturbances.

    Args:
        calls: what to time, by name; each is run once beforehand.
        device: where they run.
        rounds: how often each is timed.

    Returns:
        The median of each, in seconds.
    """
    return {name: statistics.median(times) for name, times in _turns(calls, device, rounds, math.inf).items()}


def quickest(
    calls: Mapping[Name, Callable[[], object]], device: torch.device, *, rounds: int, patience: float = math.inf
) -> dict[Name, float]:
    """The same, but the least of each: what neighbours do to a CPU only adds to its times.

    Args:
        calls: what to time, by name; each is run once beforehand.
        device: where they run.
        rounds: how often each is timed.
        patience: seconds; what took longer beforehand is timed once.
    """
    return {name: min(times) for name, times in _turns(calls, device, rounds, patience).items()}


def _turns(
    calls: Mapping[Name, Callable[[], object]], device: torch.device, rounds: int, patience: float
) -> dict[Name, list[float]]:
    slow = {name for name, call in calls.items() if seconds(call, device) > patience}
    taken: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            if turn == 0 or name not in slow:
                taken[name].append(seconds(call, device))
    return taken


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time one call, to the end of the work that it starts."""
    _wait_for(device)
    start = time.perf_counter()
    call()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
