"""A source's tokens on disk: made once, mapped into memory by every process that needs them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selective_ssm.data.config import DataConfig
from selective_ssm.data.sources import documents, source_files
from selective_ssm.data.split import name_hash
from selective_ssm.data.tokenizers import Tokenizer
from selective_ssm.errors import UserError
from selective_ssm.files import in_words, locked, replacing

_FORMAT = 1
_CHUNK = 1 << 24
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedTokens:
    """The documents of a source as one stream of ids: each a boundary and its tokens, one more boundary at the end.

    Args:
        path: file of the ids, which its suffix gives the dtype of: ``.uint16`` or ``.uint32``.
        bounds: (documents + 1,) int64, where each document begins in the stream, and where its last boundary stands.
        n_bytes: (documents,) int64, length of each text.
        hashes: (documents,) uint64, `name_hash` of each name.
        checksum: CRC-32 of the ids.
    """

    path: Path
    bounds: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    checksum: int

    @cached_property
    def ids(self) -> NDArray[Any]:
        """The ids, mapped into memory at first use, in each process for itself."""
        with in_words("read", self.path):
            return np.memmap(self.path, self.path.suffix[1:], mode="r")

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "ids"}


def cached_tokens(config: DataConfig, tokenizer: Tokenizer) -> CachedTokens:
    """Open the tokens of a config's source, after making them if that has not been done.

    They are found again by the files' paths, sizes and times of change, the tokenizer, and the field that is read; how
    they are split and cut does not matter. Of several processes that want them at once one makes them and the others
    wait. A file becomes visible whole or not at all, and one that is damaged is made anew. Old ones are never
    removed: the folder may be deleted at any time.

    Raises:
        UserError: the source or the folder is of no use, or the source changed while it was read.
    """
    key = _key(config, tokenizer)
    path = _folder(config) / f"{key}.{_dtype(tokenizer)}"
    found = _opened(path)
    if found is None:
        with locked(path):
            found = _opened(path) or _made(config, tokenizer, path)
    return found


def _folder(config: DataConfig) -> Path:
    chosen = config.cache or os.environ.get("SELECTIVE_SSM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "selective-ssm" / "tokens"


def _key(config: DataConfig, tokenizer: Tokenizer) -> str:
    """Hash of everything that the cached tokens depend on."""
    files: list[tuple[str, str, int, int]] = []
    for name, path in source_files(config.source).items():
        with in_words("read", path):
            found = path.stat()
        files.append((name, str(path.resolve()), found.st_size, found.st_mtime_ns))
    everything = json.dumps([_FORMAT, files, config.text_field, tokenizer.identity])
    return hashlib.sha256(everything.encode()).hexdigest()[:32]


def _dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _opened(path: Path) -> CachedTokens | None:
    """The tokens at a path; None if they are not there, or not as they were written."""
    try:
        with open(_index(path), "rb") as file, np.load(file, allow_pickle=False) as index:
            fields = {name: index[name] for name in ("bounds", "n_bytes", "hashes")}
            found = CachedTokens(path=path, **fields, checksum=int(index["checksum"]))
        return found if _checksum(path) == found.checksum else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _made(config: DataConfig, tokenizer: Tokenizer, path: Path) -> CachedTokens:
    """Tokenize the source. The index is written last: without it the ids are not looked at."""
    _log.info("tokenizing '%s' into '%s'", config.source, path)
    lengths: list[int] = []
    n_bytes: list[int] = []
    hashes: list[int] = []
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for document in documents(config.source, text_field=config.text_field):
            ids = np.array([tokenizer.end, *tokenizer.encode(document.text)], _dtype(tokenizer))
            file.write(ids.tobytes())
            lengths.append(len(ids))
            n_bytes.append(len(document.text))
            hashes.append(name_hash(document.name))
        file.write(np.array([tokenizer.end], _dtype(tokenizer)).tobytes())
    made = CachedTokens(
        path=path,
        bounds=np.cumsum([0, *lengths], dtype=np.int64),
        n_bytes=np.array(n_bytes, np.int64),
        hashes=np.array(hashes, np.uint64),
        checksum=_checksum(path),
    )
    if path.stem != _key(config, tokenizer):
        raise UserError(f"'{config.source}' changed while it was read: start again when nobody writes to it")
    with replacing(_index(path)) as temporary, open(temporary, "wb") as file:
        np.savez(file, bounds=made.bounds, n_bytes=made.n_bytes, hashes=made.hashes, checksum=made.checksum)
    return made


def _index(path: Path) -> Path:
    return path.with_suffix(".npz")


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
