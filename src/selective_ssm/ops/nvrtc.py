"""CUDA C++ source -> NVRTC -> cubin -> launch: compiled when first used and kept on disk; no toolkit, no compiler.

NVIDIA's `cuda.core` compiles, and `cubin_cache` keeps what it made, so that a kernel costs some milliseconds when a
process first uses it, and up to some seconds when a machine does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from selective_ssm.errors import MissingPackage
from selective_ssm.ops import cubin_cache
from selective_ssm.ops.driver import (
    bind_thread,
    bindings,
    checked,
    context,
    early_launch,
    is_overlapping,
    while_capturing,
)

Defines = tuple[tuple[str, str | int], ...]

NUMBER_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What a dtype is called in the sources."""
OLDEST_CUDA_CORE = (0, 5)
"""The first `cuda.core` outside its `experimental` folder. The extras of pyproject.toml ask for 0.7, the first that
compiles where there is no driver."""
OLDEST_CAPABILITY = (8, 0)
"""Ampere: bfloat16, and copies that bypass the registers."""
FIRST_TO_OVERLAP = (9, 0)
"""Hopper: a kernel may begin before the one before it has ended."""

_OPS = Path(__file__).parent
_OPTIONS = {"std": "c++17", "device_as_default_execution_space": True}
_PLAIN_SHARED_BYTES = 48 * 1024  # a kernel may have more only where the driver is told
_MISPLACED = (201, 400)  # invalid context, invalid handle
_Pointer = ctypes.c_void_p * 1

_lock, _importing = threading.Lock(), threading.Lock()
_kernels: dict[tuple[Path, str, Defines, int, int, bool], Kernel] = {}


@functools.cache
def explain() -> str | None:
    """Say why no kernel can run on this machine and what to do about it; ``None`` when they can."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return _absent() or _unfit(max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())))


def compile(source: Path, defines: Mapping[str, str | int], arch: str) -> bytes:
    """Compile a kernel source, at about 0.1 to 2 s; needs NVRTC but no GPU, and reads and writes no cache.

    Args:
        source: a CUDA C++ file; what it includes lies beside it, or is "device.cuh".
        defines: its configuration, as macros.
        arch: the architecture of a device, such as ``sm_90``.

    Returns:
        The cubin: machine code for that architecture alone.

    Raises:
        MissingPackage: `cuda.core` is not installed.
        RuntimeError: the source does not compile; the compiler's messages are in the text.
    """
    return _compiled(source, _text(source, set()), defines, arch)


def kernel(source: Path, name: str, defines: Defines, device: int, shared: int = 0, *, waits: bool = False) -> Kernel:
    """A kernel ready for launch on a device; made once in a process, compiled once on a machine.

    The first call for given arguments reads files, loads a module and perhaps compiles. It synchronises nothing and may
    happen while a CUDA graph is captured, though a model that has run once before is captured faster.

    Args:
        source: a CUDA C++ file; what it includes lies beside it, or is "device.cuh".
        name: its ``extern "C" __global__`` function.
        defines: its configuration, as macros.
        device: the index of a CUDA device, as torch counts.
        shared: bytes of dynamic shared memory that each block gets.
        waits: whether the kernel calls ``wait_for_previous`` before it reads what earlier kernels write, and before it
            writes: it may then begin early (see `driver.overlapping`).

    Raises:
        MissingPackage: `cuda.core` is not installed.
        RuntimeError: the source does not compile, or the driver refuses the kernel.
    """
    wanted = (source, name, defines, device, shared, waits)
    found = _kernels.get(wanted)
    if found is None:
        with _lock:
            found = _kernels.get(wanted) or _made(*wanted)
            _kernels[wanted] = found
    return found


class Kernel:
    """A function on a device, with all that can be prepared before a launch; see `kernel`."""

    __slots__ = ("_device", "_function", "_launch", "_name", "_overlaps", "_shared")

    def __init__(self, cubin: bytes, name: str, device: int, shared: int, waits: bool) -> None:
        cuda = bindings()
        self._overlaps = waits and torch.cuda.get_device_capability(device) >= FIRST_TO_OVERLAP
        self._name, self._device, self._shared = name, device, shared
        # The launch of cuda.core takes no structures. That of the bindings costs 0.4 µs, one through ctypes 1.1 µs.
        self._launch = cuda.cuLaunchKernel
        with context(device), while_capturing():
            module = checked(cuda.cuModuleLoadData(cubin), f"kernel '{name}' cannot be loaded")
            self._function = checked(cuda.cuModuleGetFunction(module, name.encode()), f"there is no kernel '{name}'")
            if shared > _PLAIN_SHARED_BYTES:
                attribute = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                result = cuda.cuFuncSetAttribute(self._function, attribute, shared)
                checked(result, f"kernel '{name}' cannot have {shared} bytes of shared memory a block")

    def __call__(self, grid: tuple[int, int, int], threads: int, parameters: ctypes.Structure, stream: int) -> None:
        """Put a launch into a stream and return; nothing is waited for.

        Args:
            grid: numbers of blocks, each at least 1.
            threads: threads a block.
            parameters: the kernel's one argument; it is copied, and may be used again afterwards. What its pointers
                point at must live until the kernel has run, as tensors allocated and freed on `stream` do.
            stream: a ``cudaStream_t`` of the kernel's device, such as ``torch.cuda.current_stream(i).cuda_stream``.

        Raises:
            RuntimeError: the driver refuses the launch, or reports the failure of earlier work.
        """
        structures = _Pointer(ctypes.addressof(parameters))
        address = ctypes.addressof(structures)
        if self._overlaps and is_overlapping():
            launch = bindings().cuLaunchKernelEx
            arguments = (early_launch(grid, threads, self._shared, stream), self._function, address, 0)
        else:
            launch, (x, y, z) = self._launch, grid
            arguments = (self._function, x, y, z, threads, 1, 1, self._shared, stream, address, 0)
        (result,) = launch(*arguments)
        if result:
            self._refused(result, functools.partial(launch, *arguments), grid, threads)

    def _refused(self, result: Any, launch: Callable[[], Any], grid: tuple[int, int, int], threads: int) -> None:
        """Launch again in the right context if that was missing, else tell why nothing was launched."""
        if int(result) in _MISPLACED:  # a new thread has no context, and another device may be the current one
            with contextlib.nullcontext() if bind_thread(self._device) else context(self._device):
                (result,) = launch()
        x, y, z = grid
        checked(
            (result,),
            f"kernel '{self._name}' was not launched on cuda:{self._device} (blocks {x} × {y} × {z}, "
            f"{threads} threads and {self._shared} bytes of shared memory each)",
        )


def _made(source: Path, name: str, defines: Defines, device: int, shared: int, waits: bool) -> Kernel:
    if (absent := _absent()) is not None:
        raise MissingPackage(absent)
    arch, text = _arch(device), _text(source, set())
    entry = cubin_cache.entry([text, sorted(defines), arch, _nvrtc_version(), _OPTIONS])
    cubin = cubin_cache.read(entry)
    if cubin is not None:
        with contextlib.suppress(RuntimeError):  # what the driver refuses is compiled anew
            return Kernel(cubin, name, device, shared, waits)
    cubin = _compiled(source, text, dict(defines), arch)
    cubin_cache.keep(entry, cubin)
    return Kernel(cubin, name, device, shared, waits)


# ---- compilation ----------------------------------------------------------------------------------------------------


def _text(path: Path, included: set[str]) -> str:
    """A source with its headers put in the place of their includes; the compiler still names files and lines rightly.

    A header is looked for beside the file that includes it, then beside this module, and comes once.
    """
    lines = [f'#line 1 "{path.parent.name}/{path.name}"']
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        found = re.fullmatch(r'#include "([\w.]+)"', line.rstrip())
        header = found and next((f for f in (path.parent / found[1], _OPS / found[1]) if f.is_file()), None)
        if not header:
            lines.append(line)
        elif header.name not in included:
            included.add(header.name)
            lines += [_text(header, included), f'#line {number + 1} "{path.parent.name}/{path.name}"']
    return "\n".join(lines)


def _compiled(source: Path, text: str, defines: Mapping[str, str | int], arch: str) -> bytes:
    if (absent := _absent()) is not None:
        raise MissingPackage(absent)
    core = _compiler()
    options = core.ProgramOptions(
        name=source.name,
        arch=arch,
        define_macro=[(name, str(value)) for name, value in defines.items()] or None,
        **_OPTIONS,
    )
    try:
        return bytes(core.Program(text, "c++", options).compile("cubin").code)
    except Exception as error:  # those of cuda.core have no public name
        _, _, log = str(error).rpartition("compilation log:")
        version, log = ".".join(map(str, _nvrtc_version())), log.strip("\0\n ")
        raise RuntimeError(f"'{source}' does not compile for {arch} with NVRTC {version}: {log}") from error


def _compiler() -> Any:
    """`cuda.core`; two threads must not import it at once, some of its versions put themselves together in steps."""
    with _importing:
        return importlib.import_module("cuda.core")


def _arch(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def _nvrtc_version() -> tuple[int, int]:
    _, major, minor = importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    return major, minor


# ---- what there is --------------------------------------------------------------------------------------------------


@functools.cache
def _absent() -> str | None:
    """Why nothing can be compiled here."""
    extra = "cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda"
    install = f"pip install 'selective-ssm[{extra}]'"
    try:
        if not all(map(importlib.util.find_spec, ("cuda.core", "cuda.bindings.nvrtc"))):
            raise ModuleNotFoundError
        version = importlib.metadata.version("cuda-core")
    except ModuleNotFoundError:
        return f"the package 'cuda-core', or its 'cuda-bindings', is not installed: {install}"
    if tuple(map(int, version.split(".")[:2])) < OLDEST_CUDA_CORE:
        return f"cuda-core {version} is too old: {install}"
    try:
        _nvrtc_version()
    except Exception as error:  # one of several, by the version of the bindings
        return f"NVRTC cannot be loaded ({error}): {install}"
    return None


def _unfit(capability: tuple[int, int]) -> str | None:
    """Why this driver or this NVRTC cannot serve a device of some compute capability."""
    wanted = ".".join(map(str, capability))
    if capability < OLDEST_CAPABILITY:
        return f"the device has compute capability {wanted}, but 8.0 or later is needed"
    version = _nvrtc_version()
    known = importlib.import_module("cuda.bindings.nvrtc").nvrtcGetSupportedArchs()[1]
    if 10 * capability[0] + capability[1] not in known:
        update = "pip install -U 'selective-ssm[cuda]'"
        return f"NVRTC {version[0]}.{version[1]} is too old for compute capability {wanted}: {update}"
    newest = checked(bindings().cuDriverGetVersion(), "the CUDA driver cannot be used") // 1000
    if newest < version[0]:
        older = f"pip install 'selective-ssm[cuda{newest}]'"
        return f"the driver is for CUDA {newest}, but NVRTC for CUDA {version[0]}: {older}"
    return None
