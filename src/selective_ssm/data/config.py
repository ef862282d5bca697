"""What to read, how to cut it into batches, and what to hold out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from selective_ssm.config import Config
from selective_ssm.errors import UserError, choice


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Text for a language model.

    Args:
        source: a file, a folder, a glob, or the word ``python_stdlib`` (see `documents`).
        text_field: the field of a JSON line that holds the document.
        tokenizer: ``bytes``, or the path of a ``tokenizer.json`` or of a folder that holds one.
        row_length: L, the longest stretch of tokens that one sequence of a batch holds.
        batch_size: B; a batch holds ``batch_size * row_length`` tokens whatever the packing.
        packing: ``joined``: (B, L) rows cut from the documents set end to end; ``packed``: one row of B·L tokens that
            holds whole documents, those longer than L cut, with ``cu_seqlens`` at which the state starts anew.
        held_out_bytes: documents are held out, in the order of a hash of their names, until they come to this many
            bytes; 0 holds out none.
        held_out_document_bytes: only documents of at most this many bytes are held out; None: any.
        seed: of the shuffle.
        cache: folder of the token cache; None: ``$SELECTIVE_SSM_CACHE``, else the user's cache folder.

    Example:
        >>> DataConfig(source="python_stdlib", held_out_bytes=64 * 1024, held_out_document_bytes=16 * 1024).packing
        'joined'
    """

    kind: ClassVar[str] = "text"
    source: str
    text_field: str = "text"
    tokenizer: str = "bytes"
    row_length: int = 1024
    batch_size: int = 8
    packing: Literal["joined", "packed"] = "joined"
    held_out_bytes: int = 0
    held_out_document_bytes: int | None = None
    seed: int = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("source must name a file, a folder or a glob, or be 'python_stdlib', got ''")
        choice("packing", self.packing, ("joined", "packed"))
        for name, least in (("row_length", 1), ("batch_size", 1), ("held_out_bytes", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.held_out_document_bytes is not None and self.held_out_document_bytes < 1:
            raise UserError(f"held_out_document_bytes must be at least 1 or null, got {self.held_out_document_bytes}")
