"""Compiled by NVRTC where it is installed, launched where there is a GPU; elsewhere a double plays the driver."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from selective_ssm.errors import MissingPackage
from selective_ssm.ops import (
    add_rms_norm,
    causal_conv1d,
    causal_conv1d_step,
    cubin_cache,
    driver,
    nvrtc,
    selective_scan,
    selective_scan_step,
)
from selective_ssm.ops.add_rms_norm import cuda as add_rms_norm_cuda
from selective_ssm.ops.causal_conv1d import cuda as causal_conv1d_cuda
from selective_ssm.ops.selective_scan import cuda as selective_scan_cuda
from selective_ssm.ops.selective_scan import step_cuda as selective_scan_step_cuda
from tests.ops.cases import ScanCase
from tests.ops.wanted import wanted_by

needs_nvrtc = pytest.mark.skipif(nvrtc._absent() is not None, reason=str(nvrtc._absent()))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
OPS = Path(nvrtc.__file__).parent
BACKENDS = (add_rms_norm_cuda, causal_conv1d_cuda, selective_scan_cuda, selective_scan_step_cuda)

SOURCES = sorted(str(path.relative_to(OPS)) for path in OPS.rglob("*.cu"))

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
        self.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
        self.CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        values = {
            "cuModuleLoadData": ("module",),
            "cuModuleGetFunction": ("function",),
            "cuDeviceGet": (0,),
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
    driver._primary_context.cache_clear()
    yield found
    driver._primary_context.cache_clear()


# ---- compiling ------------------------------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHS)
def test_the_header_compiles_for_every_architecture(source: Path, arch: str) -> None:
    cubin = nvrtc.compile(source, dict(DEFINES), arch)
    assert cubin.startswith(b"\x7fELF")
    assert b"add" in cubin


@functools.cache
def configurations() -> dict[str, set[nvrtc.Defines]]:
    """What each source is compiled for where every operator runs in bfloat16, forward, backward and for a token."""
    tensors, options = ScanCase(channels=64, state=16, groups=1, dtype=torch.bfloat16).arguments()
    x, now, one = tensors["u"], {name: tensors[name][:, 0] for name in ("u", "delta", "B", "C", "z")}, torch.ones(64)
    weight, states = torch.ones(64, 4), {16: torch.zeros(2, 64, 16), 3: torch.zeros(2, 64, 3)}

    def call() -> None:
        selective_scan(**tensors, **options, backend="cuda").backward(x)
        causal_conv1d(x, weight, one, activation="silu", backend="cuda").backward(x)
        add_rms_norm(x, x.float(), one, 1e-5, backend="cuda")[0].sum().backward()
        selective_scan_step(states[16], A=tensors["A"], **now, delta_softplus=True, backend="cuda")
        causal_conv1d_step(states[3], x[:, 0], weight, one, activation="silu", backend="cuda")

    found: dict[str, set[nvrtc.Defines]] = {}
    for one_of in wanted_by(call, *BACKENDS):
        found.setdefault(str(one_of.source.relative_to(OPS)), set()).add(one_of.defines)
    return found


@needs_nvrtc
@pytest.mark.parametrize("path", SOURCES)
def test_every_source_compiles_for_every_architecture(path: str) -> None:
    several = sorted(map(dict, configurations()[path]), key=str)
    first, *others = [(several[0], arch) for arch in ARCHS] + [(defines, ARCHS[0]) for defines in several[1:]]
    cubins = [nvrtc.compile(OPS / path, *first)]  # alone, since `cuda.core` cannot be imported by two threads at once
    with ThreadPoolExecutor(len(ARCHS)) as threads:
        cubins += threads.map(lambda job: nvrtc.compile(OPS / path, *job), others)
    assert all(cubin.startswith(b"\x7fELF") for cubin in cubins)


@needs_nvrtc
def test_an_error_names_the_line(source: Path) -> None:
    source.write_text(ADD.replace("p.summand", "p.addend"))
    with pytest.raises(RuntimeError) as caught:
        nvrtc.compile(source, dict(DEFINES), "sm_90")
    line = next(number for number, line in enumerate(ADD.splitlines(), start=1) if "p.summand" in line)
    assert re.match(
        rf"'.*add\.cu' does not compile for sm_90 with NVRTC \d+\.\d+: op/add\.cu\({line}\)", str(caught.value)
    )
    assert 'has no member "addend"' in str(caught.value)
    assert "\0" not in str(caught.value)


@needs_nvrtc
def test_an_unknown_architecture_is_told(source: Path) -> None:
    with pytest.raises(RuntimeError, match="does not compile for sm_42 with NVRTC .*invalid value for --gpu-arch"):
        nvrtc.compile(source, dict(DEFINES), "sm_42")


@needs_nvrtc
def test_a_header_beside_the_source_is_found_and_comes_once(source: Path) -> None:
    (source.parent / "shared.cuh").write_text('#include "device.cuh"\n__device__ int seven() { return 7; }\n')
    source.write_text('#include "shared.cuh"\n' + ADD.replace("p.summand", "seven()"))
    assert nvrtc.compile(source, dict(DEFINES), "sm_90")
    source.write_text('#include "shared.cuh"\n\nwrong\n')
    with pytest.raises(RuntimeError, match=re.escape("op/add.cu(3): error")):
        nvrtc.compile(source, dict(DEFINES), "sm_90")


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


@pytest.mark.parametrize(
    ("capability", "version", "newest", "reason"),
    [
        ((7, 5), (13, 0), 13000, "the device has compute capability 7.5, but 8.0 or later is needed"),
        ((12, 0), (12, 6), 13000, "NVRTC 12.6 is too old for compute capability 12.0: update cuda-core"),
        ((9, 0), (13, 0), 12080, "the driver is for CUDA 12, but NVRTC for CUDA 13: pip install 'cuda-core[cu12]'"),
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


# ---- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
def test_a_kernel_is_made_once_and_compiled_once(
    source: Path, fresh: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = [threading.Thread(target=nvrtc.kernel, args=(source, "add", DEFINES, 0)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nvrtc.kernel(source, "add", DEFINES, 0) is nvrtc.kernel(source, "add", DEFINES, 0)
    assert compiled == ["sm_90"]
    (entry,) = fresh.iterdir()
    assert entry.suffix == ".cubin"
    monkeypatch.setattr(nvrtc, "_kernels", {})  # as in another process
    nvrtc.kernel(source, "add", DEFINES, 0)
    assert compiled == ["sm_90"]


@pytest.mark.usefixtures("double")
def test_whatever_a_cubin_depends_on_has_an_entry_of_its_own(
    source: Path, fresh: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def entries() -> int:
        monkeypatch.setattr(nvrtc, "_kernels", {})
        nvrtc.kernel(source, "add", DEFINES, 0)
        return len(list(fresh.iterdir()))

    assert entries() == 1
    nvrtc.kernel(source, "add", (("FACTOR", 3),), 0)
    assert entries() == 2
    monkeypatch.setattr(nvrtc, "_arch", lambda device: "sm_80")
    assert entries() == 3
    monkeypatch.setattr(nvrtc, "_nvrtc_version", lambda: (13, 1))
    assert entries() == 4
    source.write_text(ADD + "\n")
    assert entries() == 5
    header = source.with_name("device.cuh")  # found before ours
    header.write_text("typedef long long int64;\n")
    assert entries() == 6
    assert len(compiled) == 6


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: whole[:-1] + b"?", lambda whole: b""])
@pytest.mark.usefixtures("double")
def test_a_damaged_entry_is_rebuilt(
    source: Path,
    fresh: Path,
    compiled: list[str],
    damage: Callable[[bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvrtc.kernel(source, "add", DEFINES, 0)
    (entry,) = fresh.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    monkeypatch.setattr(nvrtc, "_kernels", {})
    nvrtc.kernel(source, "add", DEFINES, 0)
    assert len(compiled) == 2
    assert entry.read_bytes() == whole


@pytest.mark.usefixtures("double")
def test_an_entry_under_the_name_of_another_is_rebuilt(source: Path, fresh: Path, compiled: list[str]) -> None:
    nvrtc.kernel(source, "add", DEFINES, 0)
    (entry,) = fresh.iterdir()
    other = entry.with_name("0" * 64 + ".cubin")
    entry.rename(other)
    assert cubin_cache.read(other) is None


def test_an_entry_that_the_driver_refuses_is_rebuilt(
    source: Path, compiled: list[str], double: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvrtc.kernel(source, "add", DEFINES, 0)
    monkeypatch.setattr(nvrtc, "_kernels", {})
    double.refused["cuModuleLoadData"] = [200]
    nvrtc.kernel(source, "add", DEFINES, 0)
    assert len(compiled) == 2
    monkeypatch.setattr(nvrtc, "_kernels", {})
    double.refused["cuModuleLoadData"] = [200, 200]
    with pytest.raises(RuntimeError, match=re.escape("kernel 'add' cannot be loaded: invalid argument (CUDA_ERROR_")):
        nvrtc.kernel(source, "add", DEFINES, 0)


@pytest.mark.usefixtures("double")
def test_an_unwritable_folder_is_told_once(source: Path, fresh: Path, compiled: list[str]) -> None:
    fresh.write_text("a file, where a folder is wanted")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nvrtc.kernel(source, "add", DEFINES, 0)
        nvrtc.kernel(source, "add", (("FACTOR", 3),), 0)
    (warning,) = caught
    assert "compiled kernels are not kept, so every process compiles them again" in str(warning.message)
    assert "a part of this path is a file" in str(warning.message)
    assert len(compiled) == 2
    nvrtc.kernel(source, "other", DEFINES, 0)  # of the same source, which is in memory
    assert len(compiled) == 2


@pytest.mark.usefixtures("double")
def test_a_user_without_a_home_is_told(
    source: Path, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SELECTIVE_SSM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cubin_cache.os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match="this user has no home folder"):
        nvrtc.kernel(source, "add", DEFINES, 0)
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("platform", "variables", "folder"),
    [
        ("linux", {"SELECTIVE_SSM_CACHE": "/chosen", "XDG_CACHE_HOME": "/xdg"}, "/chosen"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/selective-ssm/kernels"),
        ("linux", {}, "/home/me/.cache/selective-ssm/kernels"),
        ("darwin", {}, "/home/me/Library/Caches/selective-ssm/kernels"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/selective-ssm/kernels"),
    ],
)
def test_the_folder_can_be_chosen(
    platform: str, variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SELECTIVE_SSM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cubin_cache.sys, "platform", platform)
    assert cubin_cache.entry("key").parent == Path(folder)


WRITER = """
import sys
from pathlib import Path
from selective_ssm.ops import cubin_cache

print("ready", flush=True)
sys.stdin.readline()
for i in range(30):
    path = cubin_cache.entry(i % 3)
    cubin = bytes([i % 3]) * 100_000
    found = cubin_cache.read(path)
    assert found in (None, cubin)
    cubin_cache.keep(path, cubin)
    assert cubin_cache.read(path) == cubin
"""


def test_two_processes_at_once_are_safe(fresh: Path) -> None:
    command, pipe = [sys.executable, "-W", "error", "-c", WRITER], subprocess.PIPE
    writers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    for writer in writers:
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    assert len(list(fresh.iterdir())) == 3


# ---- launching, with the driver's double ----------------------------------------------------------------------------


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
@pytest.mark.parametrize("status", [201, 400])
def test_a_thread_without_the_context_is_lent_it(source: Path, double: Driver, status: int) -> None:
    kernel = nvrtc.kernel(source, "add", DEFINES, 0)
    double.calls.clear()
    double.refused["cuLaunchKernel"] = [status]
    kernel((1, 1, 1), 64, Parameters(), 0)
    order = ["cuLaunchKernel", "cuCtxPushCurrent", "cuLaunchKernel", "cuCtxPopCurrent"]
    assert [name for name, _ in double.calls] == order


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


# ---- launching, on a GPU --------------------------------------------------------------------------------------------


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
