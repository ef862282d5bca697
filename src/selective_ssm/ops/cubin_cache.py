"""Compiled kernels on disk: one file for each source, configuration, architecture and compiler.

They lie in ``selective-ssm/kernels`` under the user's cache folder, or in the folder that ``SELECTIVE_SSM_CACHE``
names, and may be removed at any time. (`cuda.core` has a cache too, but its entries hold no checksum, and other
programs share its folder.)
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path

from selective_ssm.errors import FileProblem
from selective_ssm.files import replacing

_FORMAT = 1  # of an entry; raised when that changes
_CHECKSUM = hashlib.sha256
_unsaved: dict[Path, bytes] = {}  # what could not be written


def entry(key: object) -> Path:
    """The file for all that a cubin depends on, given as plain data."""
    return _folder() / f"{hashlib.sha256(json.dumps([_FORMAT, key]).encode()).hexdigest()}.cubin"


def read(path: Path) -> bytes | None:
    """The cubin of an entry; None where there is none, or a damaged one."""
    if path in _unsaved:
        return _unsaved[path]
    try:
        content = path.read_bytes()
    except OSError:
        return None
    size = _CHECKSUM().digest_size
    checksum, cubin = content[:size], content[size:]
    return cubin if checksum == _sum(path, cubin) else None


def keep(path: Path, cubin: bytes) -> None:
    """Write an entry, whole or not at all; of several processes that write the same one, the last wins.

    Where that cannot be done the cubin stays in memory, and the first time a process warns.
    """
    try:
        if path.parts[0] == "~":
            raise FileProblem("this user has no home folder")
        with replacing(path) as temporary:
            temporary.write_bytes(_sum(path, cubin) + cubin)
    except FileProblem as error:
        if not _unsaved:
            warnings.warn(
                f"compiled kernels are not kept, so every process compiles them again: {error}; "
                "SELECTIVE_SSM_CACHE can name another folder",
                RuntimeWarning,
                stacklevel=4,  # who asked for the kernel
            )
        _unsaved[path] = cubin


def _sum(path: Path, cubin: bytes) -> bytes:
    """The checksum in front of a cubin; it covers the name too, so that a moved file is not taken for another's."""
    return _CHECKSUM(path.name.encode() + cubin).digest()


def _folder() -> Path:
    if chosen := os.environ.get("SELECTIVE_SSM_CACHE"):
        return Path(os.path.expanduser(chosen))
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base)) / "selective-ssm" / "kernels"
