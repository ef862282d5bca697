"""Retention: sums that decay by the token, over whole sequences at once, in chunks, or from one token to the next.

Legend: B batch, L length, S sequences in a pack, H heads, P head dim of queries and keys, E of values; T tokens of a
segment, M segments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from selective_ssm.layers.mixer import in_float32, without_autocast
from selective_ssm.ops.sequences import Order, Segments, boundaries, cut


def powers(exponents: Tensor, heads: int) -> Tensor:
    """γ_h^n, (…, H, n), for exponents (…, n) and γ_h = 1 - 2^(-5-h), in float64.

    Example:
        >>> powers(torch.tensor([0, 1]), heads=2).tolist()
        [[1.0, 0.96875], [1.0, 0.984375]]
    """
    head = torch.arange(heads, device=exponents.device, dtype=torch.float64)
    return torch.exp(torch.log1p(-(2.0 ** (-5 - head)))[:, None] * exponents[..., None, :])


def retain(
    q: Tensor, k: Tensor, v: Tensor, initial: Tensor, cu_seqlens: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """y_t = q_t S_t / √P with S_t = γ S_{t-1} + k_t v_tᵀ, for all tokens at once.

    In a chunk, y_i = Σ_{j ≤ i} γ^(i-j) (q_i·k_j / √P) v_j + γ^(i+1) q_i S / √P with the state S before it: matrix
    products with sides of T, P and E. From chunk to chunk states are handed on one after the other.

    Args:
        q: (B, L, H, P), turned by its positions.
        k: (B, L, H, P), likewise.
        v: (B, L, H, E).
        initial: (B, H, P, E), or (S, H, P, E) where sequences are packed, in fp32 at least.
        cu_seqlens: (S + 1,) boundaries of packed sequences.
        chunk: T.

    Returns:
        y (B, L, H, E) in v's dtype, and the last state of each sequence.
    """
    length, heads, low, wide = q.shape[1], q.shape[2], q.dtype, initial.dtype
    if length == 0:
        return v, initial
    order = Order(boundaries(length, cu_seqlens, q.device), reverse=False, is_row=cu_seqlens is None)
    segments = cut(order, length, min(chunk, length))
    q, k, v = (segments.spread(x).permute(1, 2, 3, 0, 4) for x in (q / math.sqrt(q.shape[-1]), k, v))  # (M, B, H, T, ·)

    place = torch.arange(q.shape[-2], device=q.device)
    count = len(place) - segments.is_padding.sum(0)  # (M,)
    within = powers(place[:, None] - place, heads).transpose(0, 1).tril().to(wide)  # (H, T, T)
    left = powers(count[:, None] - 1 - place, heads).masked_fill(segments.is_padding.T[:, None], 0).to(wide)
    made = in_float32((k * left[:, None, ..., None]).to(low).mT @ v)  # (M, B, H, P, E)
    given = initial[None] if cu_seqlens is None else initial[:, None]  # (S, B, H, P, E), either 1
    before, last = _hand_over(made, powers(count[:, None], heads).to(wide)[:, None, ..., None], segments, given)

    aged = powers(place + 1, heads).to(wide)[..., None]
    y = (q * aged).to(low) @ before.to(low) + ((q @ k.mT) * within).to(low) @ v
    return segments.join(y.permute(3, 0, 1, 2, 4)), last


def _hand_over(made: Tensor, decay: Tensor, segments: Segments, given: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each segment, and the last of each sequence.

    Args:
        made: (M, B, H, P, E), what each segment adds to a state.
        decay: (M, 1, H, 1, 1), by what it multiplies the one before it.
        segments: which they are.
        given: (S, B, H, P, E), the state before each sequence.
    """
    is_packed = len(given) > 1
    starts, is_first = given.index_select(0, segments.sequence) if is_packed else given, segments.is_first
    before: list[Tensor] = []
    held = starts[0]
    for index, (more, factor) in enumerate(zip(made.unbind(), decay.unbind(), strict=True)):
        if is_packed:
            held = torch.where(is_first[index], starts[index], held)
        before.append(held)
        held = torch.addcmul(more, factor, held)
    stacked = torch.stack(before)
    last, is_empty = segments.last, segments.is_empty.view(-1, 1, 1, 1, 1)
    ends = torch.addcmul(made[last], decay[last], stacked[last])
    return stacked, torch.where(is_empty, given, ends).flatten(0, 1)


def retain_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
    """One token a row: S = γ S + k vᵀ in place, y = q S / √P.

    Args:
        q: (B, H, P), turned by its position.
        k: (B, H, P), likewise.
        v: (B, H, E).
        state: (B, H, P, E).

    Returns:
        (B, H, E) in the state's dtype.
    """
    one = torch.ones(1, device=state.device, dtype=torch.int64)
    q, k, v = (x.to(state.dtype) for x in (q, k, v))
    state.mul_(powers(one, state.shape[1]).to(state.dtype)[..., None]).addcmul_(k[..., None], v[..., None, :])
    with without_autocast(state.device):
        return (q[..., None, :] @ state)[..., 0, :] / math.sqrt(q.shape[-1])
