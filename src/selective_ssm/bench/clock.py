"""Timing calls, on the CPU and where calls return before the work is done."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def medians(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    patience: float = math.inf,
) -> dict[str, float]:
    """Time calls in turns, so that all of them meet the same disturbances.

    Args:
        calls: what to time, by name; each is run once beforehand.
        device: where they run.
        rounds: how often each is timed.
        patience: seconds; what took longer when it ran beforehand is timed once.

    Returns:
        The median of each, in seconds.
    """
    slow = {name for name, call in calls.items() if seconds(call, device) > patience}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            if turn == 0 or name not in slow:
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
