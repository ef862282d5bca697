"""Which documents are held out: chosen by a hash of their names, so that the rest of the source does not matter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from selective_ssm.data.config import DataConfig
from selective_ssm.data.sources import Document, documents
from selective_ssm.errors import UserError


def name_hash(name: str) -> int:
    """The first 64 bits of the SHA-256 of a document's name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def held_out_indices(
    hashes: Sequence[int] | NDArray[np.uint64],
    n_bytes: Sequence[int] | NDArray[np.int64],
    config: DataConfig,
) -> NDArray[np.intp]:
    """Choose the documents to hold out, in the order of their hashes, until ``config.held_out_bytes`` is reached.

    Args:
        hashes: `name_hash` of each document of the source.
        n_bytes: length of each document's text.
        config: says how many bytes to hold out, and of how long documents at most.

    Returns:
        Places of the chosen documents in the source, in the order of their hashes.

    Raises:
        UserError: no document is short enough, or none would be left to train on.

    Example:
        >>> config = DataConfig(source="-", held_out_bytes=10, held_out_document_bytes=8)
        >>> held_out_indices([3, 1, 2, 0], [5, 6, 7, 9], config)
        array([1, 2])
    """
    sizes = np.asarray(n_bytes, np.int64)
    if config.held_out_bytes == 0:
        return np.empty(0, np.intp)
    order = np.argsort(np.asarray(hashes, np.uint64), kind="stable")
    if config.held_out_document_bytes is not None:
        order = order[sizes[order] <= config.held_out_document_bytes]
    bytes_before = np.cumsum(sizes[order]) - sizes[order]
    chosen = order[bytes_before < config.held_out_bytes]
    if len(chosen) == 0:
        raise UserError(
            f"no document of '{config.source}' has at most {config.held_out_document_bytes} bytes, so none can be held "
            f"out: raise held_out_document_bytes, or set held_out_bytes to 0"
        )
    if len(chosen) == len(sizes):
        raise UserError(
            f"holding out {config.held_out_bytes} bytes of '{config.source}' would leave no document to train on: "
            f"lower held_out_bytes (0 holds out none) or give more documents than {len(sizes)}"
        )
    return chosen


def held_out_documents(config: DataConfig) -> list[Document]:
    """Read the documents that training never sees.

    For ``python_stdlib`` with ``held_out_bytes=65536`` and ``held_out_document_bytes=16384`` these are whole files of
    at most 16 KiB, in the order of the hash of their relative paths, until 64 KiB is reached.

    Args:
        config: the config that the training's `TextBatches` was made from.

    Returns:
        The documents, in the order of their names' hashes; none if ``held_out_bytes`` is 0.

    Raises:
        UserError: the source cannot be read, or cannot be split as asked.
    """
    if config.held_out_bytes == 0:
        return []
    every = documents(config.source, text_field=config.text_field)
    names_and_sizes = [(document.name, len(document.text)) for document in every]
    hashes = [name_hash(name) for name, _ in names_and_sizes]
    chosen = held_out_indices(hashes, [size for _, size in names_and_sizes], config)
    wanted = {names_and_sizes[index][0]: place for place, index in enumerate(chosen)}
    again = documents(config.source, text_field=config.text_field)
    return sorted((one for one in again if one.name in wanted), key=lambda one: wanted[one.name])
