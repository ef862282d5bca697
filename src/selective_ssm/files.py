"""Atomic writes and safe reads: a reader finds the whole old file or the whole new one, whatever happens between."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, device

from selective_ssm.errors import FileProblem

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_WORDS = {
    errno.ENOENT: "there is no such file or folder",
    errno.EACCES: "permission is denied; choose a place that you may use",
    errno.EPERM: "permission is denied; choose a place that you may use",
    errno.EROFS: "the disk is read-only; choose another folder",
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file would grow beyond the size allowed here; raise the limit or choose another folder",
    errno.EEXIST: "a part of this path is a file, not a folder",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EISDIR: "this is a folder, not a file",
}
_CLAIM = "claim"


@contextlib.contextmanager
def in_words(action: str, path: str | Path) -> Generator[None]:
    """Turn an ``OSError`` of the block into a sentence: "cannot <action> '<path>': the disk is full; …".

    Raises:
        FileProblem: in place of any other ``OSError``.

    Example:
        >>> with in_words("read", "no/such/file"):
        ...     open("no/such/file")
        Traceback (most recent call last):
        selective_ssm.errors.FileProblem: cannot read 'no/such/file': there is no such file or folder
    """
    try:
        yield
    except FileProblem:
        raise
    except OSError as error:
        words = _WORDS.get(error.errno or 0, error.strerror or str(error))
        raise FileProblem(f"cannot {action} '{path}': {words}") from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Generator[Path]:
    """Write a file, or a new folder, so that it appears whole or not at all.

    The block writes to a temporary path on the same disk, in a hidden folder of its own beside ``path`` (whose folder
    is made if absent). When the block ends well, its bytes are forced to the disk and it takes the place of ``path`` in
    one step; when it fails, it is removed and ``path`` stays as it was. Of several writers at once, the last to end
    wins. What a killed process left behind is removed by the next writer of the same path.

    Args:
        path: the file to write or replace; or a folder that is not there or empty.

    Yields:
        The temporary path to write to, where nothing is yet.

    Raises:
        FileProblem: the disk is full, the folder cannot be written to, …

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     target = Path(folder) / "notes.txt"
        ...     with replacing(target) as temporary:
        ...         _ = temporary.write_text("whole")
        ...     target.read_text()
        'whole'
    """
    path = Path(path)
    with in_words("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        folder, claim = _claimed_folder(path)
        try:
            temporary = folder / "file"
            yield temporary
            if temporary.is_file():
                os.chmod(temporary, os.fstat(claim.fileno()).st_mode)  # safetensors makes its files private
            flush(temporary)
            os.replace(temporary, path)
        finally:
            claim.close()
            shutil.rmtree(folder, ignore_errors=True)
        flush(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, atomically (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def write_json(path: str | Path, data: object) -> None:
    """Write plain data as indented JSON, atomically (see `replacing`)."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as a safetensors file, atomically (see `replacing`).

    Args:
        path: the file to write or replace.
        tensors: contiguous tensors of any shape, dtype and device, no two sharing memory.
        metadata: texts to keep beside them.
    """
    with replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:
            raise _as_os_error(error) from error


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text.

    Raises:
        FileProblem: the file is missing, unreadable or no UTF-8.
    """
    with in_words("read", path):
        content = Path(path).read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise FileProblem(f"'{path}' is not a UTF-8 text: byte {error.start} cannot be decoded") from error


def read_json(path: str | Path) -> Any:
    """Read plain data from a JSON file.

    Raises:
        FileProblem: the file is missing, unreadable, empty, truncated or no JSON.
    """
    text = read_text(path)
    if not text.strip():
        raise FileProblem(f"'{path}' is empty, JSON was expected")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileProblem(f"'{path}' is not valid JSON, or is truncated: {error}") from error


def read_tensors(path: str | Path, device: str | device = "cpu") -> dict[str, Tensor]:
    """Read every tensor of a safetensors file; nothing in the file is executed.

    Args:
        path: the file.
        device: where the tensors go.

    Returns:
        The tensors by name.

    Raises:
        FileProblem: the file is missing, unreadable, empty, truncated or of another format.
    """
    with _opened(path, device) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a mapping


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the texts beside the tensors of a safetensors file, without the tensors.

    Raises:
        FileProblem: as in `read_tensors`.
    """
    with _opened(path, "cpu") as opened:
        return opened.metadata() or {}


def flush(path: Path) -> None:
    """Force a file's bytes, or a folder's list of names, to the disk."""
    if sys.platform == "win32" and path.is_dir():
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_place(path: str | Path) -> None:
    """Tell before the work that its result could not be written; the folder is made if absent.

    Raises:
        FileProblem: the place is a folder, or one in which nothing can be written.
    """
    path = Path(path)
    with in_words("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        number = errno.EISDIR if path.is_dir() else 0 if os.access(path.parent, os.W_OK) else errno.EACCES
        if number:
            raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def locked(path: str | Path) -> Generator[None]:
    """Hold an exclusive lock between processes, for as long as the block runs.

    The lock is the file ``<path>.lock``, which stays; the system frees it when its holder ends, however that ends.

    Args:
        path: what the lock is for, such as a cache that only one process may build.

    Raises:
        FileProblem: the lock's file cannot be made.
    """
    lock = Path(f"{path}.lock")
    with contextlib.ExitStack() as held:
        with in_words("lock", path):
            lock.parent.mkdir(parents=True, exist_ok=True)
            _lock(held.enter_context(open(lock, "ab")).fileno(), wait=True)
        yield


@contextlib.contextmanager
def owned(path: str | Path, *, taken: str) -> Generator[None]:
    """Be the only process that owns a file while the block runs, or fail at once.

    The file stays; the system frees it when its owner ends, however that ends. Processes forked meanwhile do not own
    it, so they cannot keep it when their parent is killed.

    Args:
        path: the lock's file, made if absent.
        taken: what to tell when another process owns it.

    Raises:
        FileProblem: another process owns it, or it cannot be made.
    """
    with contextlib.ExitStack() as held:
        with in_words("lock", path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            descriptor = held.enter_context(open(path, "ab")).fileno()
            try:
                _own(descriptor)
            except (BlockingIOError, PermissionError) as error:
                raise FileProblem(taken) from error
        yield


if sys.platform == "win32":

    def _own(descriptor: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _lock(descriptor: int, *, wait: bool) -> None:
        while wait:  # a claim (wait=False) needs no lock there: an open file cannot be removed
            with contextlib.suppress(OSError):
                os.lseek(descriptor, 0, os.SEEK_SET)
                return msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)

else:

    def _own(descriptor: int) -> None:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a forked process inherits locks of flock, not these

    def _lock(descriptor: int, *, wait: bool) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _claimed_folder(path: Path) -> tuple[Path, IO[bytes]]:
    """Make a hidden folder beside a path; the lock on its claim tells other writers that this one lives."""
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        folder.mkdir()
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as unclaimed:
            claim = unclaimed.enter_context(open(folder / _CLAIM, "ab"))
            _lock(claim.fileno(), wait=True)
            if (folder / _CLAIM).exists():  # or else another writer removed it before it was locked
                unclaimed.pop_all()
                return folder, claim


def _remove_abandoned(path: Path) -> None:
    """Remove the hidden folders of writers that are gone: nobody holds the claim on them any more."""
    prefix = f".{path.name}."
    for folder in path.parent.iterdir():
        if folder.name.startswith(prefix) and folder.suffix == ".tmp":
            with contextlib.suppress(OSError), open(folder / _CLAIM, "ab") as claim:
                _lock(claim.fileno(), wait=False)
                shutil.rmtree(folder)


@contextlib.contextmanager
def _opened(path: str | Path, device: str | device) -> Generator[safe_open]:
    """A safetensors file; what is wrong with it is said in words."""
    with in_words("read", path):
        if os.path.getsize(path) == 0:
            raise FileProblem(f"'{path}' is empty, a safetensors file was expected")
        try:
            with safe_open(path, framework="pt", device=str(device)) as opened:
                yield opened
        except SafetensorError as error:
            raise FileProblem(f"'{path}' is not a whole safetensors file (truncated or foreign): {error}") from error


def _as_os_error(error: SafetensorError) -> OSError:
    """The ``OSError`` behind a failed write, of which safetensors hands on only the text "… (os error 28)"."""
    _, _, number = str(error).rpartition("(os error ")
    code = number.partition(")")[0]
    return OSError(int(code), os.strerror(int(code))) if code.isdigit() else OSError(str(error))
