"""The most memory in use: of a GPU as torch's allocator counts it, on a CPU of the whole process."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")
_RESET = "5"  # of VmHWM, the most that the process held (man 5 proc)


def forget_peak(device: torch.device) -> None:
    """Give back what nobody uses, and begin anew to count the most memory in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and _PROCESS.exists():
        (_PROCESS / "clear_refs").write_text(_RESET)


def peak(device: torch.device) -> dict[str, float]:
    """The most memory in use since then, as a column; none where it is not counted."""
    if device.type == "cuda":
        return {"GiB": torch.cuda.max_memory_allocated(device) / 2**30}
    if device.type == "cpu" and _PROCESS.exists():
        (line,) = (one for one in (_PROCESS / "status").read_text().splitlines() if one.startswith("VmHWM:"))
        return {"GiB": int(line.split()[1]) / 2**20}
    return {}
