"""Slow, obvious float64 recurrences, one step at a time: what the operators are held against."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def spans(length: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    return list(itertools.pairwise(bounds))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same values in another precision, as a leaf that takes a gradient."""
    return x.detach().to(dtype.to_complex() if x.is_complex() else dtype).requires_grad_()


def at(x: Tensor, b: int, t: int, channels: int) -> Tensor:
    """B or C as (D, N) for one token."""
    if x.dim() == 2:
        return x
    x = x[b, t] if x.dim() == 4 else x[b, t].unsqueeze(0)
    return x.repeat_interleave(channels // x.shape[0], 0)


def scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, *,
    delta_softplus=False, initial_state=None, cu_seqlens=None, reverse=False, discretization="euler",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition of `selective_scan`, token by token, in the precision of its inputs; (out, final_state)."""
    batch, length, channels = u.shape
    dt = delta if delta_bias is None else delta + delta_bias
    dt = F.softplus(dt) if delta_softplus else dt
    rows = {}
    finals = []
    for b in range(batch):
        for s, (start, end) in enumerate(spans(length, cu_seqlens)):
            row = s if cu_seqlens is not None else b
            h = torch.zeros_like(A) if initial_state is None else initial_state[row]
            for t in range(end - 1, start - 1, -1) if reverse else range(start, end):
                step = dt[b, t].unsqueeze(-1)
                gain = step if discretization == "euler" else torch.expm1(step * A) / A
                h = torch.exp(step * A) * h + gain * at(B, b, t, channels) * u[b, t].unsqueeze(-1)
                y = (at(C, b, t, channels) * h).sum(-1)
                rows[b, t] = 2 * y.real if y.is_complex() else y
            finals.append(h)
    flat = [torch.stack([rows[b, t] for t in range(length)]) for b in range(batch)] if length else []
    y = torch.stack(flat) if flat else torch.zeros_like(u)
    y = y if D is None else y + D * u
    return y if z is None else y * F.silu(z), torch.stack(finals)


def conv(
    x, weight, bias=None, *, activation=None, initial_state=None, cu_seqlens=None, reverse=False
) -> tuple[Tensor, Tensor]:
    """The definition of `causal_conv1d`, token by token; (out, final_state)."""
    batch, length, channels = x.shape
    history = weight.shape[1] - 1
    rows = {}
    finals = []
    for b in range(batch):
        for s, (start, end) in enumerate(spans(length, cu_seqlens)):
            row = s if cu_seqlens is not None else b
            seen = x.new_zeros(channels, history) if initial_state is None else initial_state[row]
            for t in range(end - 1, start - 1, -1) if reverse else range(start, end):
                window = torch.cat([seen, x[b, t].unsqueeze(-1)], -1)
                rows[b, t] = (window * weight).sum(-1)
                seen = window[:, 1:]
            finals.append(seen)
    flat = [torch.stack([rows[b, t] for t in range(length)]) for b in range(batch)] if length else []
    out = torch.stack(flat) if flat else torch.zeros_like(x)
    out = out if bias is None else out + bias
    return F.silu(out) if activation == "silu" else out, torch.stack(finals)
