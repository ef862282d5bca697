"""A small kernel, a cache of its own for each test, and doubles of the compiler and of the driver.

A test file takes the fixtures that it uses by importing `source`, `fresh`, `compiled` and `double`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from selective_ssm.ops import cubin_cache, driver, nvrtc

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")

ADD = """#include "device.cuh"

struct Parameters {
    const float* x;
    float* y;
    int length;
    float summand;
};

extern "C" __global__ void __launch_bounds__(64) add(const __grid_constant__ Parameters p) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (i < p.length) p.y[i] = FACTOR * to_float(p.x[i]) + p.summand;
}
"""
DEFINES = (("FACTOR", 2),)


class Parameters(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("length", ctypes.c_int),
        ("summand", ctypes.c_float),
    ]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "op" / "add.cu"
    path.parent.mkdir()
    path.write_text(ADD)
    return path


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No kernel is known yet, and the folder of the cache is a new one."""
    monkeypatch.setattr(nvrtc, "_kernels", {})
    monkeypatch.setattr(cubin_cache, "_unsaved", {})
    monkeypatch.setenv("SELECTIVE_SSM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A compiler's double, and the architectures for which it was called; its cubins are their text, reversed."""
    calls: list[str] = []

    def compile(source: Path, text: str, defines: dict[str, str | int], arch: str) -> bytes:
        calls.append(arch)
        return text[::-1].encode()

    monkeypatch.setattr(nvrtc, "_compiled", compile)
    monkeypatch.setattr(nvrtc, "_absent", lambda: None)
    monkeypatch.setattr(nvrtc, "_nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "_arch", lambda device: "sm_90")
    return calls


class Driver:
    """A double of the driver: knows one context, counts, and refuses what it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.refused: dict[str, list[int]] = {}
        self.current_context = 1
        self.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
        self.CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
        self.CUlaunchConfig = self.CUlaunchAttribute = self.CUlaunchAttributeValue = SimpleNamespace
        self.CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        values = {
            "cuModuleLoadData": ("module",),
            "cuModuleGetFunction": ("function",),
            "cuDeviceGet": (0,),
            "cuCtxGetCurrent": (self.current_context,),
            "cuDevicePrimaryCtxRetain": ("context",),
            "cuThreadExchangeStreamCaptureMode": (0,),
            "cuGetErrorName": (b"CUDA_ERROR_INVALID_VALUE",),
            "cuGetErrorString": (b"invalid argument",),
        }

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            status = self.refused[name].pop(0) if self.refused.get(name) else 0
            return (status, *values.get(name, ()))

        return call

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for one, arguments in self.calls if one == name]


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    found = Driver()
    for module in (driver, nvrtc):
        monkeypatch.setattr(module, "bindings", lambda: found)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    driver._primary_context.cache_clear()
    yield found
    driver._primary_context.cache_clear()
