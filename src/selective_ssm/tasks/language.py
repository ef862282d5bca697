"""Language modelling: the loss of the next token, and its size in bits a byte."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.errors import UserError


def next_token_loss(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Cross-entropy of each position's target, computed in fp32 at least.

    loss = −(1/T) Σ_t log softmax(logits_t)[targets_t], over the T targets that are not ``ignore_index``.

    Args:
        logits: (..., V), any floating dtype.
        targets: (...), int64: the token that follows each position.
        ignore_index: targets of this value count for nothing, as in padding.
        reduction: "mean" over the counted targets, or their "sum".

    Returns:
        A scalar, in nats, fp32 (fp64 for fp64 logits); zero when no target counts.

    Raises:
        UserError: the shapes of logits and targets do not belong together.

    Example:
        >>> logits = torch.zeros(1, 3, 4)
        >>> next_token_loss(logits, torch.tensor([[0, 1, -100]]))
        tensor(1.3863)
    """
    if logits.shape[:-1] != targets.shape:
        raise UserError(
            f"logits (..., V) and targets (...) must have the same leading shape, got {tuple(logits.shape)} "
            f"and {tuple(targets.shape)}"
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    nats = F.cross_entropy(wide.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="sum")
    if reduction == "sum":
        return nats
    return nats / (targets != ignore_index).sum().clamp(min=1)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Size of a text under a model, whatever its tokens: nats / (ln 2 · bytes).

    Args:
        nats: sum of −ln p over every token of the text, document boundaries included.
        n_bytes: length of the text in bytes.

    Returns:
        Bits a byte; a compressor that turns 100 bytes into 25 reaches 2.0.

    Example:
        >>> round(bits_per_byte(math.log(256) * 10, 10), 9)
        8.0
    """
    return nats / (math.log(2) * n_bytes)
