"""Kernels launched where there is a GPU, elsewhere by a double of the driver; and what is said where none can be."""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from selective_ssm.errors import MissingPackage
from selective_ssm.ops import cubin_cache, nvrtc
from selective_ssm.ops.driver import is_overlapping, overlapping
from tests.ops.kernel_doubles import DEFINES, Driver, Parameters, compiled, double, fresh, needs_gpu, source

__all__ = ["compiled", "double", "fresh", "source"]


def test_a_missing_package_is_told(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: None)
    nvrtc._absent.cache_clear()
    try:
        with pytest.raises(MissingPackage, match=re.escape("pip install 'selective-ssm[cuda")):
            nvrtc.compile(source, dict(DEFINES), "sm_90")
        with pytest.raises(MissingPackage, match="the package 'cuda-core', or its 'cuda-bindings', is not installed"):
            nvrtc.kernel(source, "add", DEFINES, 0)
    finally:
        nvrtc._absent.cache_clear()


UPDATE, OLDER = "pip install -U 'selective-ssm[cuda]'", "pip install 'selective-ssm[cuda12]'"


@pytest.mark.parametrize(
    ("capability", "version", "newest", "reason"),
    [
        ((7, 5), (13, 0), 13000, "the device has compute capability 7.5, but 8.0 or later is needed"),
        ((12, 0), (12, 6), 13000, f"NVRTC 12.6 is too old for compute capability 12.0: {UPDATE}"),
        ((9, 0), (13, 0), 12080, f"the driver is for CUDA 12, but NVRTC for CUDA 13: {OLDER}"),
        ((9, 0), (12, 6), 13000, None),
    ],
)
def test_what_does_not_fit_is_told(
    capability: tuple[int, int],
    version: tuple[int, int],
    newest: int,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvrtc_bindings = SimpleNamespace(nvrtcGetSupportedArchs=lambda: (0, [75, 80, 86, 89, 90]))
    monkeypatch.setattr(nvrtc.importlib, "import_module", lambda name: nvrtc_bindings)
    monkeypatch.setattr(nvrtc, "_nvrtc_version", lambda: version)
    monkeypatch.setattr(nvrtc, "bindings", lambda: SimpleNamespace(cuDriverGetVersion=lambda: (0, newest)))
    assert nvrtc._unfit(capability) == reason


@pytest.mark.usefixtures("compiled")
def test_a_launch_hands_over_the_structure(source: Path, double: Driver) -> None:
    kernel = nvrtc.kernel(source, "add", DEFINES, 0, shared=1024)
    assert double.called("cuFuncSetAttribute") == []
    seen: list[int] = []

    def launch(function: str, *rest: int) -> tuple[int]:
        *sizes, stream, pointers, extra = rest
        assert (function, sizes, stream, extra) == ("function", [1, 2, 3, 64, 1, 1, 1024], 77, 0)
        parameters = ctypes.c_void_p.from_address(pointers).value
        assert parameters is not None
        seen.append(Parameters.from_address(parameters).length)
        return (0,)

    kernel._launch = launch
    assert kernel((1, 2, 3), 64, Parameters(length=5), 77) is None
    assert seen == [5]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("waits", "capability", "early"),
    [(True, (9, 0), True), (True, (12, 0), True), (True, (8, 9), False), (False, (9, 0), False)],
)
def test_only_kernels_that_wait_begin_early(
    source: Path,
    double: Driver,
    waits: bool,
    capability: tuple[int, int],
    early: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernel = nvrtc.kernel(source, "add", DEFINES, 0, shared=1024, waits=waits)
    double.calls.clear()
    with overlapping(), overlapping():
        kernel((1, 2, 3), 64, Parameters(), 77)
    assert [name for name, _ in double.calls] == ["cuLaunchKernelEx" if early else "cuLaunchKernel"]
    if early:
        ((config, function, _, _),) = double.called("cuLaunchKernelEx")
        (attribute,) = config.attrs
        assert (attribute.id, attribute.value.programmaticStreamSerializationAllowed, config.numAttrs) == (6, 1, 1)
        assert (config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX) == (1, 2, 3, 64)
        assert (function, config.sharedMemBytes, config.hStream) == ("function", 1024, 77)
    kernel((1, 2, 3), 64, Parameters(), 77)
    assert double.calls[-1][0] == "cuLaunchKernel"


def test_overlapping_is_for_one_thread_and_ends_with_the_block() -> None:
    seen: list[bool] = []
    with contextlib.suppress(KeyError), overlapping():
        thread = threading.Thread(target=lambda: seen.append(is_overlapping()))
        thread.start()
        thread.join()
        seen.append(is_overlapping())
        raise KeyError
    assert [*seen, is_overlapping()] == [False, True, False]


@pytest.mark.usefixtures("compiled")
def test_much_shared_memory_is_asked_for(source: Path, double: Driver) -> None:
    nvrtc.kernel(source, "add", DEFINES, 0, shared=100_000)
    assert double.called("cuFuncSetAttribute") == [("function", 8, 100_000)]
    double.refused["cuFuncSetAttribute"] = [1, 1]
    with pytest.raises(RuntimeError, match="kernel 'add' cannot have 1000000 bytes of shared memory a block: invalid"):
        nvrtc.kernel(source, "add", DEFINES, 0, shared=1_000_000)


@pytest.mark.usefixtures("compiled")
def test_a_module_is_loaded_in_the_devices_context_and_capture_goes_on(source: Path, double: Driver) -> None:
    nvrtc.kernel(source, "add", DEFINES, 3)
    assert [name for name, _ in double.calls] == [
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent",
        "cuThreadExchangeStreamCaptureMode",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuThreadExchangeStreamCaptureMode",
        "cuCtxPopCurrent",
    ]
    assert double.called("cuDeviceGet") == [(3,)]
    assert double.called("cuThreadExchangeStreamCaptureMode") == [(2,), (0,)]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("status", "device", "current", "lent"),
    [
        (201, 0, 0, ["cuCtxSetCurrent", "cuLaunchKernel"]),  # it keeps what torch would give it
        (201, 1, 0, ["cuCtxPushCurrent", "cuLaunchKernel", "cuCtxPopCurrent"]),
        (400, 0, 1, ["cuCtxPushCurrent", "cuLaunchKernel", "cuCtxPopCurrent"]),
    ],
)
def test_a_thread_without_the_context_is_lent_it(
    source: Path, double: Driver, status: int, device: int, current: int, lent: list[str]
) -> None:
    kernel = nvrtc.kernel(source, "add", DEFINES, device)
    double.calls.clear()
    double.refused["cuLaunchKernel"] = [status]
    double.current_context = current
    kernel((1, 1, 1), 64, Parameters(), 0)
    assert [name for name, _ in double.calls] == ["cuLaunchKernel", "cuCtxGetCurrent", *lent]


@pytest.mark.usefixtures("compiled")
def test_a_refused_launch_is_told(source: Path, double: Driver) -> None:
    kernel = nvrtc.kernel(source, "add", DEFINES, 0)
    double.refused["cuLaunchKernel"] = [1]
    with pytest.raises(RuntimeError) as caught:
        kernel((1, 2, 3), 64, Parameters(), 0)
    assert str(caught.value) == (
        "kernel 'add' was not launched on cuda:0 (blocks 1 × 2 × 3, 64 threads and 0 bytes of shared memory each): "
        "invalid argument (CUDA_ERROR_INVALID_VALUE)"
    )


def launch(source: Path, x: torch.Tensor, y: torch.Tensor, threads: int = 64) -> None:
    kernel = nvrtc.kernel(source, "add", DEFINES, x.device.index)
    parameters = Parameters(x.data_ptr(), y.data_ptr(), x.numel(), 1.0)
    kernel((-(-x.numel() // 64), 1, 1), threads, parameters, torch.cuda.current_stream(x.device).cuda_stream)


@needs_gpu
def test_a_kernel_runs_on_the_current_stream(source: Path) -> None:
    assert nvrtc.explain() is None
    x = torch.arange(1000, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        x.mul_(2)  # after the sleep, and before the kernel only if that is in the same stream
        launch(source, x, y)
    side.synchronize()
    assert torch.equal(y.cpu(), 4 * torch.arange(1000.0) + 1)


@needs_gpu
def test_a_kernel_may_be_made_while_a_graph_is_captured(source: Path) -> None:
    x, y = torch.zeros(100, device="cuda"), torch.zeros(100, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(source, x, y)
    x.fill_(3)
    graph.replay()
    assert torch.equal(y.cpu(), torch.full((100,), 7.0))


@needs_gpu
def test_a_new_thread_may_launch(source: Path) -> None:
    x, y = torch.ones(100, device="cuda"), torch.zeros(100, device="cuda")
    torch.cuda.synchronize()
    thread = threading.Thread(target=launch, args=(source, x, y))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(y.cpu(), torch.full((100,), 3.0))


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is only one CUDA device")
def test_another_device_than_the_current_one_serves(source: Path) -> None:
    for device in (1, 0):
        x, y = torch.ones(100, device=f"cuda:{device}"), torch.zeros(100, device=f"cuda:{device}")
        launch(source, x, y)
        assert torch.equal(y.cpu(), torch.full((100,), 3.0))


@needs_gpu
def test_a_bad_launch_is_told(source: Path) -> None:
    x, y = torch.ones(100, device="cuda"), torch.zeros(100, device="cuda")
    with pytest.raises(RuntimeError, match=r"'add' was not launched on cuda:0 .*: .* \(CUDA_ERROR_INVALID_VALUE\)"):
        launch(source, x, y, threads=2048)
    with pytest.raises(RuntimeError, match="there is no kernel 'other': .*not found"):
        nvrtc.kernel(source, "other", DEFINES, 0)
    with pytest.raises(RuntimeError, match="cannot have 10000000 bytes of shared memory a block"):
        nvrtc.kernel(source, "add", DEFINES, 0, shared=10_000_000)
    launch(source, x, y)
    assert torch.equal(y.cpu(), torch.full((100,), 3.0))


@needs_gpu
def test_a_damaged_entry_is_rebuilt_on_the_device(source: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.ones(100, device="cuda"), torch.zeros(100, device="cuda")
    launch(source, x, y)
    (entry,) = fresh.iterdir()
    whole = entry.read_bytes()
    cubin_cache.keep(entry, b"no machine code, and a checksum that says so")
    monkeypatch.setattr(nvrtc, "_kernels", {})
    launch(source, x, y)
    assert entry.read_bytes() == whole
