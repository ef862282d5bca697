"""Lets the CUDA backends run on CPU tensors, their kernels in the emulator."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from selective_ssm.ops import dispatch, nvrtc
from tests.ops import emulator


def emulate(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType, order: str | int = "forward") -> None:
    """From here on the operators run these backend modules on CPU tensors; new tensors are full of NaN."""

    def kernel(source: Path, name: str, defines: nvrtc.Defines, device: int, shared: int = 0, **_: bool) -> Any:
        def launch(grid: tuple[int, int, int], threads: int, parameters: ctypes.Structure, stream: int) -> None:
            emulator.run(source, name, dict(defines), grid, threads, shared, parameters, order=order)

        return launch

    monkeypatch.setattr(nvrtc, "kernel", kernel)
    monkeypatch.setattr(dispatch, "BACKENDS", {**dispatch.BACKENDS, "cuda": lambda case: None})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    for module in modules:  # kernels are not to be remembered
        for name, value in vars(module).items():
            if isinstance(value, functools._lru_cache_wrapper) and value.__module__ == module.__name__:
                monkeypatch.setattr(module, name, functools.cache(value.__wrapped__))
    poison(monkeypatch)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what is allocated with NaN, so that no number is read before it is written."""

    def poisoned(allocate: Any) -> Any:
        def allocated(*arguments: Any, **options: Any) -> torch.Tensor:
            x = allocate(*arguments, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocated

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
