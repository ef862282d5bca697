"""Tokenizers: bytes as they are, or a ``tokenizer.json`` of the ``tokenizers`` package."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from selective_ssm.errors import FileProblem, UserError
from selective_ssm.files import read_json, read_text, write_json, write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_END = "<|endoftext|>"
# Without the name of a class, transformers choose one by the model's, which may have other tokens than the file.
_CLASS = "tokenizer_class"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")  # a byte of a character that the vocabulary lacks


class Tokenizer(Protocol):
    """Text to ids and back. Ids go from 0 to ``vocab_size - 1``; text alone never gives the id ``end``."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are, ``end`` included."""
        ...

    @property
    def end(self) -> int:
        """The id of the boundary that begins and ends every document."""
        ...

    @property
    def identity(self) -> str:
        """Equal for two tokenizers that give the same ids."""
        ...

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text, no boundary added; `UserError` if a ``str`` holds half of a surrogate pair."""
        ...

    def encode_array(self, text: str | bytes) -> NDArray[np.integer[Any]]:
        """The ids of `encode` in the least memory: at most 4 bytes each. The array may be read-only."""
        ...

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, boundaries left out; `UserError` if an id is none of the vocabulary."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer` reads into a folder."""
        ...


class ByteTokenizer:
    """A byte is its own id, 256 is the boundary: nothing to learn, nothing that cannot be written.

    Example:
        >>> ByteTokenizer().encode("aé")
        [97, 195, 169]
        >>> ByteTokenizer().decode([256, 97, 195, 169, 256]).decode()
        'aé'
    """

    vocab_size = 257
    end = 256
    identity = "bytes"

    def encode(self, text: str | bytes) -> list[int]:
        """The bytes of a text, a ``str`` as UTF-8."""
        return list(_as_bytes(text))

    def encode_array(self, text: str | bytes) -> NDArray[np.uint8]:
        """The bytes of a text, where they already are."""
        return np.frombuffer(_as_bytes(text), np.uint8)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The ids as bytes, boundaries left out."""
        known = [_checked(id, self.vocab_size) for id in ids]
        return bytes(id for id in known if id != self.end)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer_config.json``, which says that ids are bytes."""
        write_json(Path(folder) / _CONFIG, {"kind": "bytes", _CLASS: "SelectiveSSMByteTokenizer"})


class TokenizersTokenizer:
    """A tokenizer of the ``tokenizers`` package.

    Special tokens are never read out of a text, where they may stand by chance or by malice: they are text there.
    Texts are never truncated or padded, whatever the file asks for. Bytes that are no UTF-8 are encoded as U+FFFD. The
    bytes of a byte-level vocabulary, and of the tokens ``<0x00>`` to ``<0xFF>`` of one that falls back on bytes, come
    back one token at a time, also in the middle of a character.

    Args:
        backend: the package's own tokenizer.
        end_token: what begins and ends every document.

    Raises:
        UserError: the tokenizer has no such token.
    """

    def __init__(self, backend: Backend, end_token: str = _END) -> None:
        end = backend.token_to_id(end_token)
        if end is None:
            raise UserError(f"the tokenizer has no token '{end_token}' to begin and end documents with")
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.end_token = end_token
        self.end: int = end
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_file(cls, path: str | Path) -> TokenizersTokenizer:
        """Read a ``tokenizer.json``.

        The boundary is ``<|endoftext|>``, or, where that does not exist, the ``eos_token`` that a
        ``tokenizer_config.json`` in the same folder names.

        Raises:
            UserError: the file is missing or no tokenizer, or names no boundary.
        """
        from tokenizers import Tokenizer as Backend

        text = read_text(path)
        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the package raises nothing narrower
            raise FileProblem(f"'{path}' is not a file of the package 'tokenizers': {error}") from error
        return cls(backend, _end_token(backend, Path(path)))

    @property
    def identity(self) -> str:
        """Hash of the tokenizer's own file, which says everything about it."""
        return hashlib.sha256(f"{self.end} {self._backend.to_str()}".encode()).hexdigest()

    @property
    def definition(self) -> dict[str, Any]:
        """The content of its ``tokenizer.json``."""
        return json.loads(self._backend.to_str())

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text, no special token added."""
        return self._backend.encode(_as_bytes(text).decode("utf-8", "replace"), add_special_tokens=False).ids

    def encode_array(self, text: str | bytes) -> NDArray[np.int32]:
        """The ids of a text; while they are found, the package itself takes more than they do."""
        return np.array(self.encode(text), np.int32)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, special tokens left out."""
        known = [_checked(id, self.vocab_size) for id in ids]
        if self._bytes_of_token is None:
            return b"".join(self._runs(known))
        return b"".join(self._bytes_of_token[id] for id in known)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json``, and ``tokenizer_config.json``, which names the boundary."""
        write_text(Path(folder) / _TOKENIZER, self._backend.to_str(pretty=True))
        named = {"eos_token": self.end_token, "pad_token": self.end_token}  # as nothing reads padding
        write_json(Path(folder) / _CONFIG, {**named, _CLASS: "PreTrainedTokenizerFast"})

    def _runs(self, ids: list[int]) -> Iterator[bytes]:
        """The bytes of each run of byte tokens, and of the tokens between, as the package writes them after a byte."""

        def text_of(run: list[int]) -> bytes:
            return self._backend.decode(run, skip_special_tokens=True).encode()

        before: list[int] = []
        for are_bytes, members in groupby(ids, self._byte_tokens.__contains__):
            run = list(members)
            if are_bytes:
                yield bytes(self._byte_tokens[id] for id in run)
            else:
                yield text_of(before + run)[len(text_of(before)) :]
            before = run[-1:]

    @cached_property
    def _byte_tokens(self) -> dict[int, int]:
        """The byte of each token ``<0x00>`` to ``<0xFF>``, where the decoder takes those as bytes."""
        decoder = self._backend.decoder
        if decoder is None or decoder.decode(["<0x41>"]) != "A":
            return {}
        named = self._backend.get_vocab(with_added_tokens=False).items()
        return {id: int(found[1], 16) for token, id in named if (found := _BYTE_TOKEN.fullmatch(token))}

    @cached_property
    def _bytes_of_token(self) -> list[bytes] | None:
        """The bytes behind each id of a byte-level vocabulary; None for other kinds."""
        from tokenizers.decoders import ByteLevel

        if not isinstance(self._backend.decoder, ByteLevel):
            return None
        table = [b""] * self.vocab_size
        for token, id in self._backend.get_vocab(with_added_tokens=False).items():
            table[id] = _bytes_of(token)
        for id, added in self._backend.get_added_tokens_decoder().items():
            table[id] = b"" if added.special else added.content.encode()
        table[self.end] = b""
        return table


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """Read the tokenizer that lies in a checkpoint's folder.

    Returns:
        The tokenizer, or None when there is none.

    Raises:
        UserError: what is there cannot be read.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> print(load_tokenizer(folder))
        None
        >>> ByteTokenizer().save(folder)
        >>> load_tokenizer(folder).vocab_size
        257
    """
    folder = Path(folder)
    if _config_in(folder).get("kind") == "bytes":
        return ByteTokenizer()
    if (folder / _TOKENIZER).exists():
        return TokenizersTokenizer.from_file(folder / _TOKENIZER)
    return None


def tokenizer_from(spec: str) -> Tokenizer:
    """Make the tokenizer that a config names.

    Args:
        spec: ``bytes``, or the path of a tokenizer's file or of a folder that holds one.

    Raises:
        UserError: there is none at that path, or it cannot be read.

    Example:
        >>> tokenizer_from("bytes").end
        256
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if not path.is_dir():
        return TokenizersTokenizer.from_file(path)
    found = load_tokenizer(path)
    if found is None:
        raise FileProblem(f"the folder '{spec}' holds no tokenizer: it has no {_TOKENIZER}")
    return found


def _as_bytes(text: str | bytes) -> bytes:
    try:
        return text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        bad = text[error.start]
        raise UserError(f"the text cannot be encoded as UTF-8: character {error.start} is {bad!r}") from error


def _checked(id: int, vocab_size: int) -> int:
    if not 0 <= id < vocab_size:
        raise UserError(f"the id {id} is outside of the tokenizer's vocabulary, 0 to {vocab_size - 1}")
    return int(id)


def _config_in(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    config = read_json(path) if path.exists() else {}
    if not isinstance(config, dict):
        raise FileProblem(f"'{path}' must hold a JSON object, got {type(config).__name__}")
    return config


def _end_token(backend: Backend, path: Path) -> str:
    """The token that begins and ends documents."""
    if backend.token_to_id(_END) is not None:
        return _END
    named = _config_in(path.parent).get("eos_token")
    if isinstance(named, dict):
        named = named.get("content")
    if not isinstance(named, str):
        raise UserError(
            f"'{path}' has no token '{_END}' to begin and end documents with: "
            f"name another as eos_token in a {_CONFIG} beside it"
        )
    return named


def _bytes_of(token: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary; of one that is written as it is, its UTF-8."""
    byte_of = byte_of_character()
    known = all(character in byte_of for character in token)
    return bytes(byte_of[character] for character in token) if known else token.encode()


@cache
def byte_of_character() -> dict[str, int]:
    """The byte for which each character of a byte-level vocabulary stands.

    Bytes that print stand for themselves, the others for the characters from U+0100 on (Radford et al. 2019, GPT-2).
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    characters = [*map(chr, printing), *(chr(0x100 + place) for place in range(len(others)))]
    return dict(zip(characters, [*printing, *others], strict=True))
