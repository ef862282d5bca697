"""The CPU library: compiled C++ behind a plain C interface, loaded with ctypes; it never sees torch's headers.

Each kernel is there once for each instruction set that it was compiled for. The fastest that this machine has is
taken, or the one that ``SELECTIVE_SSM_VECTORS`` names: ``avx512``, ``avx2`` or ``baseline``. ``SELECTIVE_SSM_LIBRARY``
may name a file to load in the library's place, such as one that was built to be debugged.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.resources
import os
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from selective_ssm.errors import UserError, nearest

ABI_VERSION = 6
"""What the exported functions look like; raised together with ``selective_ssm_abi_version`` in native.cpp."""
NUMBERS = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes that kernels read and write, as vector.hpp numbers them."""
VECTORS = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": None}
"""The instruction sets, and their names for people; the baseline's depends on the machine."""
LEAST_FOR_THREADS = 1 << 17
"""Numbers to compute below which more threads do not pay: about 0.1 ms of work. One token of any model is less."""
LEAST_IN_A_ROW = 1 << 11
"""The same where launches are noted, to be run in a row: threads are then awake, and a region costs about 1 µs."""

_NOTES = threading.local()
_REBUILD = "install a C++ compiler (g++ or clang++) and then selective-ssm again, or run 'make native' in its source"


def load() -> ctypes.CDLL:
    """Load the CPU library, once in a process.

    Returns:
        The library, its version checked.

    Raises:
        RuntimeError: it cannot be loaded; the sentence is that of `explain`.
    """
    library = _loaded()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


def explain() -> str | None:
    """Say why the CPU library cannot be loaded and what to do about it; ``None`` when it can."""
    library = _loaded()
    return library if isinstance(library, str) else None


def available() -> list[str]:
    """The instruction sets that there are kernels for and that this machine has, fastest first.

    Raises:
        RuntimeError: the library cannot be loaded.
    """
    return _text("selective_ssm_vectors").split()


@functools.cache
def vectors() -> str:
    """The instruction set whose kernels run, chosen once: the one that SELECTIVE_SSM_VECTORS names, else the fastest.

    Raises:
        RuntimeError: the library cannot be loaded.
        UserError: there is none of that name, or this machine does not have it.
    """
    able = available()
    wanted = os.environ.get("SELECTIVE_SSM_VECTORS") or able[0]
    if wanted not in VECTORS:
        names = ", ".join(map(repr, VECTORS))
        hint = nearest(wanted, VECTORS)
        raise UserError(f"SELECTIVE_SSM_VECTORS is {wanted!r}, which does not exist{hint}; expected one of {names}")
    if wanted not in able:
        names = ", ".join(map(repr, able))
        raise UserError(f"SELECTIVE_SSM_VECTORS is {wanted!r}, but of its instruction sets this machine has {names}")
    return wanted


def build() -> str:
    """Name the vector instructions and the threads that kernels run with, such as ``AVX2, 8 threads of OpenMP``."""
    names = VECTORS[vectors()] or _text("selective_ssm_baseline")
    count = torch.get_num_threads()
    return f"{names}, {count} {'thread' if count == 1 else 'threads'} of {_text('selective_ssm_threads')}"


@functools.cache
def function(name: str) -> Callable[[Any], None]:
    """A kernel of the chosen instruction set.

    It takes `ctypes.byref` of its arguments' structure, and lets other Python threads run meanwhile. Within `noted` its
    calls are written down.

    Raises:
        RuntimeError: the library cannot be loaded.
        UserError: SELECTIVE_SSM_VECTORS names nothing that can run.
    """
    kernel = load()[f"selective_ssm_{name}_{vectors()}"]
    kernel.argtypes, kernel.restype = [ctypes.c_void_p], None
    address = ctypes.cast(kernel, ctypes.c_void_p).value or 0

    def call(parameters: Any) -> None:
        kernel(parameters)
        if (notes := _notes()) is not None:
            notes.append(Launch(address, parameters._obj))

    call.__name__ = kernel.__name__
    return call


class Launch(NamedTuple):
    """A call of a kernel."""

    kernel: int  # its address
    parameters: ctypes.Structure


@contextlib.contextmanager
def noted() -> Generator[list[Launch], None, None]:
    """Gives a list of the kernels that this Python thread calls from here on."""
    _NOTES.launches = []
    try:
        yield _NOTES.launches
    finally:
        _NOTES.launches = None


class Launches:
    """Kernels to be called one after the other, by one call; whoever makes it sees to it that their memory stays."""

    def __init__(self, launches: Sequence[Launch]) -> None:
        self._structures = [launch.parameters for launch in launches]
        rows = [(launch.kernel, ctypes.addressof(launch.parameters)) for launch in launches]
        self._threads = max(launch.parameters.threads for launch in launches)
        self._array = (_Launch * len(rows))(*rows)
        self._run = load().selective_ssm_run
        self._run.argtypes, self._run.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int], None

    def run(self) -> None:
        """Calls them; other Python threads run meanwhile."""
        self._run(self._array, len(self._structures), self._threads)


class _Launch(ctypes.Structure):
    _fields_: ClassVar = [("kernel", ctypes.c_void_p), ("parameters", ctypes.c_void_p)]


def threads(numbers: int) -> int:
    """How many threads so many numbers are worth: as many as torch has, or one."""
    least = LEAST_FOR_THREADS if _notes() is None else LEAST_IN_A_ROW
    return torch.get_num_threads() if numbers >= least else 1


def _notes() -> list[Launch] | None:
    """Where this Python thread's launches are written down, if they are."""
    return getattr(_NOTES, "launches", None)


def _text(name: str) -> str:
    """What a function of the library without arguments says."""
    told = load()[name]
    told.restype = ctypes.c_char_p
    return told().decode()


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    if sys.platform == "win32":
        return "there is no CPU library for Windows; the reference backend serves there"
    paths = _libraries()
    return _checked(paths[0]) if paths else f"the CPU library was not built at installation: {_REBUILD}"


def _libraries() -> list[Path]:
    named = os.environ.get("SELECTIVE_SSM_LIBRARY")
    if named:
        return [Path(named)]
    folder = importlib.resources.files("selective_ssm") / "_native"
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(Path(str(file)) for file in files if file.name.endswith((".so", ".dylib")))


def _checked(path: Path) -> ctypes.CDLL | str:
    try:
        library = ctypes.CDLL(str(path))
        version = library.selective_ssm_abi_version()
    except OSError as error:
        return f"the CPU library cannot be loaded ({error}): {_REBUILD}"
    except AttributeError:
        return f"'{path}' is not the CPU library of selective-ssm: {_REBUILD}"
    if version != ABI_VERSION:
        return f"the CPU library has interface version {version}, but {ABI_VERSION} is needed: {_REBUILD}"
    if _FORKS:
        library.selective_ssm_forked()
    return library


_FORKS: list[int] = []
"""Not empty in a forked child: OpenMP's threads stayed with its parent, and a library loaded now cannot see that."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _FORKS.append(os.getpid()))
