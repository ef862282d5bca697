"""Rows of a table, one a token: torch's own, but that on a GPU the gradient of few rows is a product of matrices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ROWS = 64
"""Of a weight whose gradient is a product: its work grows with the rows, that of torch's with the tokens alone."""

CHUNK = 1024
"""Tokens of a product: over all of them at once few blocks of a GPU would have work, since the result is so small."""


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """As `torch.nn.functional.embedding`, with a gradient that takes less time on a GPU where the vocabulary is small.

    To add up what each row gets, torch sorts the tokens. For up to `MOST_ROWS` rows dW = onehot(ids)^T dy instead: sums
    in fp32 (float64 for float64), rounded once to the weight's dtype, the same bits each time. As in all products of
    fp32 numbers, `torch.set_float32_matmul_precision` says what is left of dy; and a dy that is no number leaves none
    in any row.

    Args:
        ids: (...) int32 or int64, below V.
        weight: (V, D).

    Returns:
        The rows weight[ids], (..., D).

    Example:
        >>> embedding(torch.tensor([1, 0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[3., 4.],
                [1., 2.]])
    """
    is_product = weight.is_cuda and len(weight) <= MOST_ROWS and torch.is_grad_enabled() and weight.requires_grad
    return _Rows.apply(ids, weight) if is_product and not torch.compiler.is_compiling() else F.embedding(ids, weight)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ids: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.embedding(ids, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ids, weight = inputs
        ctx.save_for_backward(ids)
        ctx.rows = len(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (ids,), (d_y,) = ctx.saved_tensors, gradients
        return None, _gradient(ids.flatten(), d_y.reshape(ids.numel(), d_y.shape[-1]), ctx.rows)


def _gradient(ids: Tensor, d_y: Tensor, rows: int) -> Tensor:
    """(rows, D): the sums of those of d_y (N, D) whose ids (N,) are the row's."""
    wide = d_y.to(torch.promote_types(d_y.dtype, torch.float32))
    onehot = (ids[:, None] == torch.arange(rows, device=ids.device)).to(wide.dtype)
    chunks = len(ids) // CHUNK
    rest = chunks * CHUNK
    with torch.autocast(d_y.device.type, enabled=False):
        parts = onehot[:rest].unflatten(0, (chunks, CHUNK)).mT @ wide[:rest].unflatten(0, (chunks, CHUNK))
        return (parts.sum(0) + onehot[rest:].T @ wide[rest:]).to(d_y.dtype)
