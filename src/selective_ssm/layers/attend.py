"""Softmax attention of queries to all keys up to their own, by the best of torch's kernels that can do it.

Legend: S rows (one a sequence), T queries of a row, C keys, L tokens of a pack, H heads, G key heads, P head dim.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.layers.cache import visible
from selective_ssm.layers.rotary import xpos_decay
from selective_ssm.ops.sequences import covering

_VARLEN = "torch.nn.attention.varlen"
_QUERIES = 1024  # looked at together where the mask is a tensor, or where xPos measures from the first of them


def attend(q: Tensor, k: Tensor, v: Tensor, before: Tensor, earlier: int, *, xpos: bool = False) -> Tensor:
    """y_t = Σ_m softmax_m(q_t·k_m / √P) v_m over the keys m up to t's own, which may come after others.

    Args:
        q: (S, T, H, P), the queries.
        k: (S, C, G, P), C ≥ T; key head g serves the H / G heads from g H / G on.
        v: (S, C, G, P).
        before: (S,) int64, the place among the keys of each row's first query.
        earlier: the largest of these, known to the host.
        xpos: whether scores fade with the distance as xPos has it: queries and keys are times ζ^(±n/512), n being
            measured from the first query of a block of 1,024, as from a text's beginning they would overflow.

    Returns:
        (S, T, H, P).

    Source: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), equation 1; Ainslie et al., "GQA"
    (arXiv 2305.13245), section 2.2.
    """
    length = q.shape[1]
    if earlier == 0 and not xpos:
        return _attend_from_start(q, k[:, :length], v[:, :length])
    blocks: list[Tensor] = [q[:, :0]]
    for first in range(0, length, _QUERIES):
        last = min(first + _QUERIES, length)
        keys = min(earlier + last, k.shape[1])
        queries, seen = q[:, first:last], k[:, :keys]
        if xpos:
            queries = xpos_decay(queries, torch.arange(last - first, device=q.device)[None])
            distance = before[:, None] + first - torch.arange(keys, device=q.device)
            seen = xpos_decay(seen, distance.clamp_min(-_QUERIES))
        if keys == last - first:
            blocks.append(_attend_from_start(queries, seen, v[:, :keys]))
        else:
            blocks.append(_attend_masked(queries, seen, v[:, :keys], visible(before, first, last, keys)))
    return torch.cat(blocks, dim=1)


def _attend_from_start(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As many queries as keys, each row's from its first token on."""
    is_grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped).transpose(1, 2)


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Queries (S, T, H, P) see the keys that a mask (S, T, C) says; heads that share keys are more queries of these."""
    sharing = q.shape[2] // k.shape[2]
    folded = q.unflatten(2, (-1, sharing)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (S, G, H / G · T, P)
    y = F.scaled_dot_product_attention(
        folded, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask.repeat(1, sharing, 1)[:, None]
    )
    return y.unflatten(2, (sharing, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def runs_packed(q: Tensor) -> bool:
    """Whether `attend_packed` can: torch 2.10 or later, CUDA, half precision, heads of at most 256 in steps of 8."""
    is_low = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and is_low and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0 and find_spec(_VARLEN) is not None


def attend_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """As `attend`, within each sequence of a pack and without padding, by torch's varlen attention.

    Args:
        q: (L, H, P).
        k: (L, G, P).
        v: (L, G, P).
        cu_seqlens: (S + 1,) boundaries of the sequences.

    Returns:
        (L, H, P).
    """
    varlen_attn = import_module(_VARLEN).varlen_attn
    is_first_form = "is_causal" in signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if is_first_form else {"window_size": (-1, 0)}
    if k.shape[1] < q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    offsets = covering(cu_seqlens, len(q)).to(torch.int32)
    return varlen_attn(q, k, v, offsets, offsets, len(q), len(q), **causal)
