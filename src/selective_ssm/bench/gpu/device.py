"""What a GPU could do at best, and in what state it was while it was timed."""

from __future__ import annotations

import functools
import subprocess
from typing import Any

import torch

from selective_ssm.bench.cases import Setup
from selective_ssm.bench.gpu.clock import time_of

_EXPONENTIALS_A_CLOCK = 16  # of one multiprocessor, in every generation from sm_70 to sm_120
_ASKED = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu")


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy too large for any cache."""
    elements = 2**28 if device.type == "cuda" else 2**18
    source, target = (torch.zeros(elements, dtype=torch.float32, device=device) for _ in range(2))
    return 2 * source.nbytes / time_of(lambda: target.copy_(source), Setup(device=device, rounds=10)).gpu


@functools.cache
def exponentials_a_second(device: torch.device) -> float | None:
    """Special functions a second at the highest clock; None where that is not told."""
    highest = state(device).get("clocks.max.sm")
    if highest is None:
        return None
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return multiprocessors * _EXPONENTIALS_A_CLOCK * float(highest) * 1e6


def state(device: torch.device) -> dict[str, Any]:
    """Driver, clocks (MHz), power (W) and temperature (°C) as nvidia-smi tells them; nothing without it."""
    if device.type != "cuda":
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader,nounits"]
    if torch.cuda.device_count() > 1:
        command += ["-i", f"GPU-{torch.cuda.get_device_properties(device).uuid}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    told = (value.strip() for value in answer.splitlines()[0].split(","))
    return {key: value for key, value in zip(_ASKED, told, strict=False) if not value.startswith("[")}
