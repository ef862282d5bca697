"""Runs the CUDA sources on the CPU, thread by thread, so that they can be tested where there is no GPU.

`device.cuh` stands in for ops/device.cuh; `runtime.cpp` runs the threads. Told on the way: warps that diverge, memory
out of alignment, writes outside shared memory, indices beyond a local array, whole numbers that overflow, and, if the
tensors are `fenced`, accesses outside them. Shared memory is NaN until it is written, and so is what is copied to
asynchronously until it is waited for. A missing barrier shows as a result that changes with the order of the threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["ORDERS", "explain", "fenced", "prepare", "run"]

ORDERS: tuple[str | int, ...] = ("forward", "backward", 1)
"""Orders of threads and blocks that between them show a missing barrier."""

_FOLDER = Path(__file__).parent
_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-fno-exceptions", "-w")
_CHECKS = (
    "-fsanitize=alignment,bounds,integer-divide-by-zero,shift-exponent,signed-integer-overflow",
    "-fno-sanitize-recover=all",
)
_MAX_SHARED = 227 * 1024

_BOUNDS = r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)"
_KERNEL = re.compile(rf'extern "C" __global__ void\s+(?:{_BOUNDS}\s+)?(?P<name>\w+)(?P<parameters>\([^()]*\))')
_ENTRY = r"""extern "C" void \g<name>\g<parameters>;
EXPORTED unsigned long size_of_\g<name>() { return emulator::size(\g<name>); }
EXPORTED int emulate_\g<name>(const void* parameters, int gx, int gy, int gz, int threads, unsigned long shared,
                              int order, char* error, unsigned long error_size) {
    return emulator::launch([](const void* p) { emulator::call(\g<name>, p); }, parameters, gx, gy, gz, threads, shared,
                            order, error, error_size);
}
\g<0>""".replace("EXPORTED", 'extern "C" __attribute__((visibility("default")))').replace("\n", " ")
"""Goes before a kernel, in one line, so that its lines keep their numbers."""

_one_at_a_time = threading.Lock()


def explain() -> str | None:
    """Say why kernels cannot be emulated on this machine; ``None`` when they can."""
    if os.name != "posix":
        return f"the emulator of kernels does not run on {platform.system()}"
    if shutil.which("g++") is None:
        return "the emulator of kernels needs g++"
    return None


def run(
    source: Path,
    name: str,
    defines: Mapping[str, str | int],
    grid: Sequence[int],
    threads: int,
    shared: int,
    parameters: ctypes.Structure,
    *,
    order: str | int = "forward",
) -> None:
    """Run every block of a kernel, one after the other.

    `grid` has three numbers, `shared` is in bytes, pointers among the parameters are those of CPU tensors; `order` is
    "forward", "backward" or the seed of a random one, for the threads of a block and for the blocks. What a GPU would
    not forgive is a RuntimeError.
    """
    if len(grid) != 3 or min(grid) < 1 or max(grid[1:]) > 65535 or not 1 <= threads <= 1024:
        raise RuntimeError(f"a grid of {tuple(grid)} blocks of {threads} threads cannot be launched")
    if not 0 <= shared <= _MAX_SHARED:
        raise RuntimeError(f"a block can have {_MAX_SHARED} bytes of shared memory, but {shared} are asked for")
    library = _library(_text(source, set()), source.stem, tuple(defines.items()))
    size_of, emulate = library[f"size_of_{name}"], library[f"emulate_{name}"]
    size_of.restype = ctypes.c_ulong
    if size_of() != ctypes.sizeof(parameters):
        sizes = f"{size_of()} bytes of parameters, but {ctypes.sizeof(parameters)} are given"
        raise RuntimeError(f"{name} of {source.name} takes {sizes}")
    turn = order + 1 if isinstance(order, int) else {"forward": 0, "backward": -1}[order]
    error = ctypes.create_string_buffer(1024)
    with _one_at_a_time:
        failed = emulate(
            ctypes.byref(parameters), *grid, threads, ctypes.c_ulong(shared), turn, error, ctypes.c_ulong(len(error))
        )
    if failed:
        raise RuntimeError(f"{name} of {source.name}: {error.value.decode()}")


def prepare(wanted: Iterable[tuple[Path, Mapping[str, str | int]]]) -> None:
    """Compile sources for some configurations, on all cores; `run` would, one by one."""
    jobs = list(
        dict.fromkeys((_text(source, set()), source.stem, tuple(defines.items())) for source, defines in wanted)
    )
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda job: _library(*job), jobs))


def fenced(x: Tensor) -> Tensor:
    """A copy whose memory ends where no access is allowed; before it lie NaNs, and then no access either."""
    page = mmap.PAGESIZE
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    used = -(-span * x.element_size() // 16) * 16
    pages = -(-used // page) + 2
    memory = mmap.mmap(-1, pages * page)
    memory.write(b"\xff" * len(memory))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (0, pages - 1):  # PROT_NONE is 0
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + fence * page), ctypes.c_size_t(page), 0):
            raise OSError("memory cannot be fenced")
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    flat = whole[len(memory) - page - used :][: span * x.element_size()].view(x.dtype)
    return flat.as_strided(x.shape, x.stride(), flat.storage_offset()).copy_(x.detach())


def _text(file: Path, included: set[str]) -> str:
    """A source with the headers beside it in the place of their includes, each once."""
    lines = [f'#line 1 "{file.parent.name}/{file.name}"']
    for number, line in enumerate(file.read_text().splitlines(), 1):
        include = re.match(r'#include "(.+)"', line)
        if not include or include[1] == "device.cuh":
            lines.append(line)
        elif include[1] not in included:
            included.add(include[1])
            lines += [_text(file.parent / include[1], included), f'#line {number + 1} "{file.parent.name}/{file.name}"']
    return "\n".join(lines)


@functools.cache
def _library(text: str, name: str, defines: tuple[tuple[str, str | int], ...]) -> ctypes.CDLL:
    """A source's kernels with their emulator, compiled once for each content."""
    runtime = _built("runtime.o", ["-c", "-O2", *_FLAGS, "-x", "c++", "-"], (_FOLDER / "runtime.cpp").read_text())
    macros = [f"-D{key}={value}" for key, value in defines]
    flags = ["-shared", "-O1", *_FLAGS, *_CHECKS, *macros, "-x", "c++", "-", "-x", "none", str(runtime)]
    return ctypes.CDLL(str(_built(f"{name}.so", flags, _KERNEL.sub(_ENTRY, text))))


def _built(name: str, arguments: list[str], program: str) -> Path:
    """The file that g++ makes of a program, from the cache or for it."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError(explain() or "")
    command = [compiler, "-I", str(_FOLDER), *arguments]
    version = os.stat(os.path.realpath(compiler)).st_mtime_ns
    key = repr((command, version, (_FOLDER / "device.cuh").read_text(), program))
    file = _cache() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}-{name}"
    if file.exists():
        return file
    with tempfile.TemporaryDirectory(dir=_cache()) as folder:
        made = Path(folder) / name
        done = subprocess.run([*command, "-o", str(made)], cwd=folder, input=program, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ cannot make {name}:\n{done.stderr}")
        made.replace(file)
    return file


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"selective-ssm-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user")
    return folder
