"""Zstandard files as streams. The package's own reader takes a truncated file for a whole one, this one does not."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from selective_ssm.errors import require

_CHUNK = 1 << 20


def open_zstd(path: str | Path, mode: str = "rb") -> io.BufferedReader:
    """Open a ``.zst`` file for reading, as ``gzip.open`` does; reading a truncated one raises `EOFError`."""
    zstandard: Any = require("zstandard", "zstd")
    return io.BufferedReader(_ZstdReader(zstandard, open(path, mode)), _CHUNK)


class _ZstdReader(io.RawIOBase):
    """The unpacked bytes of a file, frame after frame."""

    def __init__(self, zstandard: Any, file: io.IOBase | Any) -> None:
        self._error: type[Exception] = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._file = file
        self._frame: Any = None
        self._packed = b""
        self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(_CHUNK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._unpack()
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count

    def _unpack(self) -> None:
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            self._unpacked = self._frame.decompress(self._packed)
        except self._error as error:
            raise OSError(str(error)) from error
        self._packed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None

    def close(self) -> None:
        self._file.close()
        super().close()
