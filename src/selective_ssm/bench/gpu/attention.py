"""Causal attention of torch, by the fastest of its implementations, alone and in a whole layer.

Legend: B batch, L length, H heads, P head dim, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from selective_ssm.bench.cases import Setup
from selective_ssm.bench.clock import seconds

_KNOWN = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_LONG = 0.5  # seconds


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over (B, H, L, P)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def fastest(call: Callable[[], object], setup: Setup) -> str | None:
    """The implementation with which a call is fastest; None where none of them can serve it."""
    taken: dict[str, float] = {}
    for name in _KNOWN:
        try:
            with using(name):
                call()
                taken[name] = seconds(call, setup.device)
                if taken[name] < _LONG:
                    taken[name] = min(seconds(call, setup.device) for _ in range(3))
        except RuntimeError:  # not built, not for this GPU, dtype or shape: torch has the reasons as warnings
            continue
        if taken[name] > _LONG:
            break  # the known ones are in the order in which they usually finish
    return min(taken, key=lambda name: taken[name], default=None)


@contextmanager
def using(name: str | None) -> Generator[None]:
    """Let torch take no other implementation; any for None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name is None:
            yield
            return
        with sdpa_kernel(_KNOWN[name]):
            yield


def limited(call: Callable[[], object], name: str | None) -> Callable[[], object]:
    """A call that uses one implementation."""

    def within() -> object:
        with using(name):
            return call()

    return partial(within)


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) with a GELU between a width of 4 D.

    Args:
        d_model: D.
        head_dim: P.
    """

    def __init__(self, d_model: int, head_dim: int) -> None:
        super().__init__()
        self.heads = d_model // head_dim
        self.norm_attention, self.norm_mlp = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.up_proj = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down_proj = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, L, D) to the same shape."""
        q, k, v = self.in_proj(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down_proj(F.gelu(self.up_proj(self.norm_mlp(x)), approximate="tanh"))
