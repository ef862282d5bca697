"""How well a language model predicts whole documents, however long; only their ids take memory that grows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selective_ssm.data.sources import Document
from selective_ssm.data.tokenizers import Tokenizer
from selective_ssm.errors import UserError
from selective_ssm.models import LanguageModel, ModelState
from selective_ssm.tasks.language import bits_per_byte, next_token_loss


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model needs to spell out some documents.

    Args:
        nats: the sum over all tokens of −log p(token | what stands before it in its document).
        tokens: the number of tokens predicted: each document's own and the ``end`` after it.
        bytes: the length of the documents in bytes.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Mean nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is past the largest float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits the model needs for a byte of the documents."""
        return bits_per_byte(self.nats, self.bytes)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    group: int = 16,
    chunk: int = 2048,
) -> Evaluation:
    """Let a model predict whole documents, token by token, each from all that stands before it.

    A document is read as [end] + ids and predicted as ids + [end]. The state carries it from chunk to chunk, so that
    nothing is cut off or forgotten, however long it is. Several documents are read side by side, packed into one row;
    each sees only itself, so the result does not depend on ``group`` or ``chunk``.

    What the model needs does not grow with a document. Its ids are held, at 4 bytes each, and so is its text until the
    next is read: 5 bytes for each byte of text with a byte tokenizer. Other tokenizers take more while they encode.

    Args:
        model: the language model, on any device.
        documents: the documents; no more than ``group`` are held at a time.
        tokenizer: the one the model was trained with.
        group: how many documents are read side by side.
        chunk: how many tokens, of all documents together, are read at once.

    Returns:
        The sums over all documents.

    Raises:
        UserError: there are no documents, or nothing is in them.
    """
    nats, tokens, size = 0.0, 0, 0
    stream = iter(documents)
    while found := _group(model, islice(stream, group), tokenizer, chunk):
        nats += found.nats
        tokens += found.tokens
        size += found.bytes
    if size == 0:
        raise UserError("there is nothing to evaluate: the data holds no text")
    return Evaluation(nats=nats, tokens=tokens, bytes=size)


def _group(model: LanguageModel, documents: Iterable[Document], tokenizer: Tokenizer, chunk: int) -> Evaluation | None:
    """What the model needs for some documents, read side by side; None if there are none. It keeps nothing of them."""
    sequences: list[Tensor] = []
    size = 0
    for document in documents:
        sequences.append(_bounded(tokenizer.encode_array(document.text), tokenizer.end))
        size += len(document.text)
    if not sequences:
        return None
    tokens = sum(len(one) - 1 for one in sequences)
    return Evaluation(nats=_group_nats(model, sequences, chunk), tokens=tokens, bytes=size)


def _bounded(ids: NDArray[np.integer[Any]], end: int) -> Tensor:
    return torch.from_numpy(np.concatenate([[end], ids, [end]], dtype=np.int32))


def _group_nats(model: LanguageModel, sequences: list[Tensor], chunk: int) -> float:
    """The nats of all but the first token of each sequence, read side by side and dropped where they end."""
    device = next(model.parameters()).device
    nats, place, state = 0.0, 0, None
    while sequences:
        length = max(1, chunk // len(sequences))
        pieces = [one[place : place + length + 1] for one in sequences]
        loss, state = _packed_loss(model, pieces, state, device)
        nats += loss
        place += length
        unread = [row for row, one in enumerate(sequences) if place + 1 < len(one)]
        if 0 < len(unread) < len(sequences):
            state = state.select(unread)
        sequences = [sequences[row] for row in unread]
    return nats


def _packed_loss(
    model: LanguageModel, pieces: Sequence[Tensor], state: ModelState | None, device: torch.device
) -> tuple[float, ModelState]:
    """Read all but the last token of each piece in one row; the nats of all but the first."""
    ids = torch.cat([piece[:-1] for piece in pieces])[None].to(device, torch.int64)
    targets = torch.cat([piece[1:] for piece in pieces])[None].to(device, torch.int64)
    starts = torch.tensor([0, *(len(piece) - 1 for piece in pieces)]).cumsum(0).to(device)
    output = model(ids, state, cu_seqlens=starts, return_state=True)
    return float(next_token_loss(output.logits, targets, reduction="sum")), output.state
