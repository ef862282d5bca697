"""Timing calls, on the CPU and where calls return before the work is done."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def medians(calls: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int) -> dict[str, float]:
    """Time calls in turns, so that all of them meet the same disturbances.

    Args:
        calls: what to time, by name; each is run once beforehand.
        device: where they run.
        rounds: how often each is timed.

    Returns:
        The median of each, in seconds.
    """
    for call in calls.values():
        seconds(call, device)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(seconds(call, device))
    return {name: statistics.median(times) for name, times in taken.items()}


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
