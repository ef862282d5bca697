"""Batches of text as a pure function of a config and a step number."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from selective_ssm.data.cache import CachedTokens, cached_tokens
from selective_ssm.data.config import DataConfig
from selective_ssm.data.packing import Ints, JoinedRows, PackedRows
from selective_ssm.data.split import held_out_indices
from selective_ssm.data.tokenizers import Tokenizer, tokenizer_from

IGNORE = -100
"""Target of a position that counts for nothing, as in ``torch.nn.functional.cross_entropy``."""


class Batch(NamedTuple):
    """What one step of training sees. A document's ids are [end] + ids, its targets are ids + [end].

    Args:
        ids: (B, L) int64; packed: (1, B·L).
        targets: the id that follows each of ``ids``, int64 of the same shape; -100 where nothing follows.
        cu_seqlens: None when joined; packed: (S + 1,) int32, the bounds of the sequences in the row, from 0 to B·L.
            Unused positions at the row's end are a sequence of their own.
    """

    ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None


class TextBatches(Dataset[Batch]):
    """The batches of a text, for ever: ``batches[step]`` depends on the config and the step alone.

    So any step can be sought at once, and the number of workers changes nothing::

        steps = range(consumed, total)
        DataLoader(batches, batch_size=None, sampler=steps, num_workers=2)

    goes on after ``consumed`` batches; ``range(consumed * ranks + rank, total * ranks, ranks)`` shares them among
    ranks. Save ``identity`` beside the number of batches consumed: where it differs, the data does.

    The documents, each a boundary and its tokens, are put into an order drawn from the seed. Joined: that stream is cut
    into rows of L tokens, at other places in each epoch, and the rows are shuffled in each epoch. Packed: documents
    longer than L are cut into pieces of L, the pieces are shuffled and set into batches one after another as they
    fit, and the batches are shuffled in each epoch. Either way each token is a target exactly once an epoch, which may
    end within a batch when joined.

    Making one tokenizes the source, or opens the cache of an earlier time (see `cached_tokens`). It can be pickled; a
    worker opens the cache for itself.

    Args:
        config: the data.

    Raises:
        UserError: the source, the tokenizer or the cache folder is of no use; the sentence says why.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.txt").write_text("abcdefg")
        >>> batches = TextBatches(
        ...     DataConfig(source=str(folder / "a.txt"), row_length=8, batch_size=1, cache=str(folder / "cache"))
        ... )
        >>> sorted(batches[0].ids[0].tolist()), batches.batches_per_epoch
        ([97, 98, 99, 100, 101, 102, 103, 256], 1.0)
    """

    batches_per_epoch: float
    """How many steps make one pass over the text: ``step / batches_per_epoch`` is the epoch."""
    bytes_per_token: float
    """Bytes of text for each target: bits per byte = nats per token / ln 2 / ``bytes_per_token``."""
    identity: str
    """Hash of everything that the batches depend on: texts, tokenizer and config."""

    def __init__(self, config: DataConfig) -> None:
        tokenizer = tokenizer_from(config.tokenizer)
        self._tokens = tokens = cached_tokens(config, tokenizer)
        kept = np.delete(np.arange(len(tokens.n_bytes)), held_out_indices(tokens.hashes, tokens.n_bytes, config))
        starts, lengths = tokens.bounds[kept], np.diff(tokens.bounds)[kept]
        if config.packing == "joined":
            self._shape = config.batch_size, config.row_length
            self._rows = JoinedRows(starts, lengths, config.row_length, config.seed)
        else:
            self._shape = 1, config.batch_size * config.row_length
            self._rows = PackedRows(starts, lengths, config.row_length, self._shape[1], config.seed)
        self._end = tokenizer.end
        self.batches_per_epoch = len(self._rows) / self._shape[0]
        self.bytes_per_token = float(tokens.n_bytes[kept].sum() / lengths.sum())
        self.identity = _identity(config, tokenizer, tokens, kept)

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, from 0 on without end.

        Raises:
            IndexError: the step is negative.
        """
        if step < 0:
            raise IndexError(f"a step must be at least 0, got {step}")
        ids = np.full(self._shape, self._end, np.int64)
        targets = np.full(self._shape, IGNORE, np.int64)
        bounds = [0]
        for row in range(len(ids)):
            epoch, place = divmod(step * len(ids) + row, len(self._rows))
            bounds = self._fill(ids[row], targets[row], self._rows.spans(epoch, place))
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if isinstance(self._rows, PackedRows) else None
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets), cu_seqlens)

    def _fill(self, ids: Ints, targets: Ints, spans: Ints) -> list[int]:
        """Copy stretches of the stream into a row, one after another; returns their bounds, up to the row's end."""
        bounds = [0]
        for start, stop in spans.tolist():
            begin, end = bounds[-1], bounds[-1] + stop - start
            ids[begin:end] = self._tokens.ids[start:stop]
            targets[begin:end] = self._tokens.ids[start + 1 : stop + 1]
            bounds.append(end)
        return bounds if bounds[-1] == len(ids) else [*bounds, len(ids)]


def _identity(config: DataConfig, tokenizer: Tokenizer, tokens: CachedTokens, kept: NDArray[np.intp]) -> str:
    cut = (config.packing, config.row_length, config.batch_size, config.seed)
    text = (tokens.checksum, tokens.bounds[kept].tolist(), tokenizer.identity)
    return hashlib.sha256(json.dumps([*cut, *text]).encode()).hexdigest()
