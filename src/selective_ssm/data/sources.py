"""Documents from files, folders and globs: plain text and JSON lines, also compressed, one at a time."""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import os
import platform
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from selective_ssm.data.stdlib import EXCLUDED, STDLIB, stdlib_folder
from selective_ssm.data.zstd import open_zstd
from selective_ssm.errors import FileProblem, UserError, nearest
from selective_ssm.files import in_words

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".zst": open_zstd}


class Document(NamedTuple):
    """A text with a name of its own, which stays the same from run to run and from machine to machine.

    The name is the file's path relative to the source; a JSON line adds its number: ``books/old.jsonl.xz:17``.
    """

    name: str
    text: bytes


def documents(source: str | Path, *, text_field: str = "text") -> Iterator[Document]:
    r"""Read a source document by document, in an order that never changes.

    A plain file is one document, byte for byte, whatever its encoding. Each line of a ``.jsonl`` file is one, the
    field ``text_field`` of an object. ``.gz``, ``.xz`` and ``.zst`` after either are unpacked as they are read.
    Capitals in these endings do not matter. Documents without any text are left out.

    Args:
        source: a file; a folder, read recursively (names that start with a dot are left out); a glob, where ``**``
            stands for any folders; or ``python_stdlib``, the running Python's own library without its tests.
        text_field: the field of a JSON line that holds the document.

    Yields:
        Documents, those of a folder or glob sorted by name.

    Raises:
        UserError: the source is missing, unreadable, damaged or holds no text at all.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
        >>> _ = (folder / "a.txt").write_text("one")
        >>> [document.name for document in documents(folder)]
        ['a.txt', 'b.jsonl:1', 'b.jsonl:2']
    """
    empty = True
    for name, path in source_files(source).items():
        for document in _documents_of(name, path, text_field):
            if document.text:
                empty = False
                yield document
    if empty:
        raise UserError(f"'{source}' holds no text at all: name a file or folder with some text in it")


def records(path: str | Path) -> Iterator[dict[str, Any]]:
    r"""The objects of a file of JSON lines, packed as `documents` takes it or not, one at a time.

    Raises:
        UserError: the file is missing, unreadable or damaged, or a line is no JSON object.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> _ = path.write_text('{"goal": "one"}\n{"goal": "two"}\n')
        >>> [record["goal"] for record in records(path)]
        ['one', 'two']
    """
    path = Path(path).expanduser()
    with _opened(path) as file:
        for number, line in _lines(file):
            yield _object_of(line, f"{path}:{number}")


def source_files(source: str | Path) -> dict[str, Path]:
    """The files that a source consists of, by the names that their documents take.

    Raises:
        UserError: there is none.
    """
    path = Path(source).expanduser()
    with in_words("read", source):
        if str(source) == STDLIB:
            files = _files_below(stdlib_folder(), excluded=EXCLUDED, suffix=".py")
        elif path.is_dir():
            files = _files_below(path)
        elif path.exists():
            files = {path.name: path}
        elif glob.has_magic(str(path)):
            files = _files_matching(str(path))
        else:
            raise FileProblem(f"there is no file or folder '{source}'{_hint(path)}")
    if not files:
        what = "the folder has no file" if path.is_dir() else "the pattern matches no file"
        raise FileProblem(f"nothing to read in '{source}': {what}")
    return files


def describe_source(source: str | Path) -> str:
    """A source in words, for reports: of the standard library, whose text depends on it, with Python's version."""
    if str(source) == STDLIB:
        return f"the standard library of {platform.python_implementation()} {platform.python_version()}"
    return str(source)


def _files_below(folder: Path, *, excluded: frozenset[str] = frozenset(), suffix: str = "") -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if name not in excluded and not name.startswith(".")]
        paths = [Path(root, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
        found.update((path.relative_to(folder).as_posix(), path) for path in paths)
    return dict(sorted(found.items()))


def _files_matching(pattern: str) -> dict[str, Path]:
    root = Path(pattern)
    while glob.has_magic(str(root)):
        root = root.parent
    paths = [Path(match) for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)]
    return dict(sorted((path.relative_to(root).as_posix(), path) for path in paths))


def _raise(error: OSError) -> None:
    raise error


def _hint(path: Path) -> str:
    try:
        return nearest(path.name, [STDLIB, *os.listdir(path.parent)])
    except OSError:
        return ""


def _documents_of(name: str, path: Path, text_field: str) -> Iterator[Document]:
    suffix = path.suffix.lower()
    plain_name = path.stem if suffix in _OPENERS else path.name
    with _opened(path) as file:
        if plain_name.lower().endswith(".jsonl"):
            yield from _json_lines(name, path, file, text_field)
        else:
            yield Document(name, file.read())


@contextmanager
def _opened(path: Path) -> Generator[IO[bytes]]:
    """A file, unpacked as it is read; what is wrong where it cannot be read or unpacked is said in words."""
    try:
        with in_words("read", path), _OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            yield file
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise FileProblem(f"'{path}' is truncated or no {path.suffix} file: {error}") from error


def _json_lines(name: str, path: Path, file: IO[bytes], text_field: str) -> Iterator[Document]:
    for number, line in _lines(file):
        place = f"{path}:{number}"
        fields = _object_of(line, place, f"a JSON object with a field '{text_field}'")
        yield Document(f"{name}:{number}", _text_of(fields, place, text_field))


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something, and their numbers."""
    return ((number, line) for number, line in enumerate(file, start=1) if line.strip())


def _object_of(line: bytes, place: str, expected: str = "a JSON object") -> dict[str, Any]:
    try:
        # Bytes that are no UTF-8 pass through JSON as lone surrogates and come back as they were.
        found = json.loads(line.decode("utf-8", "surrogateescape").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not a JSON line: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{place} must be {expected}, got {type(found).__name__}")
    return found


def _text_of(fields: dict[str, Any], place: str, text_field: str) -> bytes:
    if text_field not in fields:
        raise UserError(
            f"{place} has no field '{text_field}'{nearest(text_field, fields)}: set the text field to the name of the "
            "one that holds the text"
        )
    text = fields[text_field]
    if not isinstance(text, str):
        raise UserError(f"the field '{text_field}' of {place} must be a text, got {type(text).__name__}")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, written as an escape
        return text.encode("utf-8", "surrogatepass")
