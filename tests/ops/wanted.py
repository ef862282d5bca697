"""Which kernels a call would launch, found out without a GPU and without running any."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from selective_ssm.ops import nvrtc
from tests.ops import emulator
from tests.ops.launches import emulate


class Wanted(NamedTuple):
    source: Path
    name: str
    defines: nvrtc.Defines
    shared: int
    grid: tuple[int, int, int]
    threads: int
    waits: bool


def wanted_by(
    call: Callable[[], Any], *modules: ModuleType, multiprocessors: int = 132, most_shared: int = 227 * 1024
) -> list[Wanted]:
    """What `call` launches through the backends in `modules`, in order; its results mean nothing."""
    asked: list[Wanted] = []

    def kernel(
        source: Path, name: str, defines: nvrtc.Defines, device: int, shared: int = 0, *, waits: bool = False
    ) -> Any:
        def launch(grid: tuple[int, int, int], threads: int, parameters: ctypes.Structure, stream: int) -> None:
            asked.append(Wanted(source, name, defines, shared, grid, threads, waits))

        return launch

    with pytest.MonkeyPatch.context() as patch:
        emulate(patch, *modules)
        patch.setattr(nvrtc, "kernel", kernel)
        with_multiprocessors(patch, multiprocessors, most_shared)
        call()
    return asked


def prepare_emulated(request: pytest.FixtureRequest, test: str, want: Callable[[str], list[Wanted]]) -> None:
    """Compiles at once, for the emulator, what `want` says of each case of a test of this module that will be run."""
    if emulator.explain() is not None:
        return
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    cases = [item.callspec.params["case"] for item in items if item.function is getattr(request.module, test)]
    emulator.prepare((one.source, dict(one.defines)) for case in cases for one in want(case))


def with_multiprocessors(monkeypatch: pytest.MonkeyPatch, count: int, shared: int = 227 * 1024) -> None:
    """From here on torch says that a GPU has so many, and so many bytes of shared memory for a block."""
    properties = SimpleNamespace(multi_processor_count=count, shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
