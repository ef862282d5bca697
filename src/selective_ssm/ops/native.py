"""The CPU library: compiled C++ behind a plain C interface, loaded with ctypes; it never sees torch's headers."""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import sys
from pathlib import Path

ABI_VERSION = 1
"""What the exported functions look like; raised together with ``selective_ssm_abi_version`` in native.cpp."""

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


def build() -> str:
    """Name the vector instructions and the threads that the library was compiled for, such as ``AVX2, OpenMP``."""
    function = load().selective_ssm_build
    function.restype = ctypes.c_char_p
    return function().decode()


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    if sys.platform == "win32":
        return "there is no CPU library for Windows; the reference backend serves there"
    paths = _libraries()
    return _checked(paths[0]) if paths else f"the CPU library was not built at installation: {_REBUILD}"


def _libraries() -> list[Path]:
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
    return library
