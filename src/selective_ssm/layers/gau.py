"""GAU, the gated attention unit: one head of attention where the Mamba block has its SSM.

Legend: B batch, L length, E expanded width, P width of queries and keys, S rows (one a sequence), T queries of a row,
C keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selective_ssm.errors import UserError, choice
from selective_ssm.layers.cache import Reading, append, empty_cache, visible
from selective_ssm.layers.checks import require_positive
from selective_ssm.layers.linear import Linear
from selective_ssm.layers.mixer import Mixer, MixerConfig, State, in_float32, reset_linear, without_autocast
from selective_ssm.layers.rotary import rotate
from selective_ssm.ops import checks
from selective_ssm.ops.slots import Slots

_QUERIES = 1024  # looked at together


@dataclass(frozen=True, kw_only=True)
class GAUConfig(MixerConfig):
    """What a gated attention unit is made of; the defaults are the paper's.

    Args:
        expand: width E of values and gate as a multiple of d_model.
        head_dim: width P of queries and keys.
        positions: "rope", a learned bias of scores by distance, made of two rotated vectors; or "none".
        bias: whether in_proj and out_proj have biases.
    """

    kind: ClassVar[str] = "gau"

    expand: int = 2
    head_dim: int = 128
    positions: Literal["none", "rope"] = "rope"
    bias: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "expand", "head_dim")
        choice("positions", self.positions, ("none", "rope"))
        if self.positions == "rope" and self.head_dim % 2:
            raise UserError(f"gau: rope turns pairs: head_dim must be even, got {self.head_dim}")


@final
class GAU(Mixer):
    """Gated attention unit: out_proj(u · A v) with u, v, z = SiLU(in_proj(input)).

    A_tm = relu(q_t·k_m / √P + b_{t-m})² / (t + 1) for m ≤ t; q and k are z, scaled and shifted channel by channel, and
    b_{t-m} = (R_t a)·(R_m b) with the rotations R of RoPE. The sum is divided by how many tokens were seen: it keeps
    its size, and depends on none that follow.

    The state is a cache of k (B, C, P) and v (B, C, E) and the number of tokens (B,); it grows as that of `Attention`.

    Source: Hua et al., "Transformer Quality in Linear Time" (arXiv 2202.10447), section 3.

    Example:
        >>> gau = GAU(GAUConfig(head_dim=4), d_model=8)
        >>> y, state = gau(torch.randn(1, 5, 8), return_state=True)
        >>> [tuple(part.shape) for part in state]
        [(1, 5, 4), (1, 5, 16), (1,)]
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"scale", "shift"})

    def __init__(self, config: GAUConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        width, narrow = config.expand * d_model, config.head_dim
        self._sizes = (width, width, narrow)
        self.in_proj = Linear(d_model, sum(self._sizes), bias=config.bias)
        self.scale = nn.Parameter(torch.empty(2, narrow))  # of q and of k
        self.shift = nn.Parameter(torch.empty(2, narrow))
        self.a = nn.Parameter(torch.empty(narrow)) if config.positions == "rope" else None
        self.b = nn.Parameter(torch.empty(narrow)) if config.positions == "rope" else None
        self.out_proj = Linear(width, d_model, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew; q and k start as z itself."""
        reset_linear(self.in_proj)
        reset_linear(self.out_proj)
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.shift)
        for vector in (self.a, self.b):
            if vector is not None:
                nn.init.normal_(vector, std=0.02)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        _, width, narrow = self._sizes
        return empty_cache(batch, max_length, [(narrow,), (width,)], device, dtype)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        if cu_seqlens is not None:
            checks.cu_seqlens(cu_seqlens, *x.shape[:2])
        u, v, q, k = self._project(x)
        reading = Reading.of(x, state, cu_seqlens)
        keys, values, _ = end = reading.extend(state, k, v)
        y = self._attend(reading.spread(q), keys, values, reading.before, reading.earlier)
        return self.out_proj(u * reading.join(y)), end if return_state else None

    def step(self, x: Tensor, state: State, *, state_indices: Tensor | None = None) -> tuple[Tensor, State]:
        slots = Slots.named(state_indices, len(x), state[2])
        before = slots.take(state[2]).clone()
        u, v, q, k = self._project(x)
        keys, values = append(state, before, (k, v), slots)
        y = self._attend(q[:, None], keys, values, before, keys.shape[1] - 1)
        return self.out_proj(u * y[:, 0]), state

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gate u and v (…, E), q and k (…, P)."""
        u, v, z = F.silu(self.in_proj(x)).split(self._sizes, dim=-1)
        q, k = ((z * scale + shift).to(z.dtype) for scale, shift in zip(self.scale, self.shift, strict=True))
        return u, v, q / math.sqrt(q.shape[-1]), k

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, before: Tensor, earlier: int) -> Tensor:
        """A v (S, T, E) for queries (S, T, P) after `before` (S,) of the keys (S, C, P) with values (S, C, E)."""
        k, v = k.to(q.dtype), v.to(q.dtype)
        blocks: list[Tensor] = [v[:, :0]]
        for first in range(0, q.shape[1], _QUERIES):
            last = min(first + _QUERIES, q.shape[1])
            seen = min(earlier + last, k.shape[1])
            place = before[:, None] + torch.arange(first, last, device=q.device)  # (S, T)
            scores = in_float32(q[:, first:last] @ k[:, :seen].mT) + self._bias(place, seen)
            weights = F.relu(scores).square() / (place[..., None] + 1)
            weights = weights.masked_fill(~visible(before, first, last, seen), 0)
            blocks.append(weights.to(v.dtype) @ v[:, :seen])
        return torch.cat(blocks, dim=1)

    def _bias(self, place: Tensor, keys: int) -> Tensor | float:
        """The bias of the scores (S, T, keys) of queries at these places (S, T)."""
        if self.a is None or self.b is None:
            return 0.0
        a, b = (in_float32(vector).expand(1, 1, 1, -1) for vector in (self.a, self.b))
        of_queries = rotate(a, place)[:, :, 0]
        of_keys = rotate(b, torch.arange(keys, device=place.device)[None])[0, :, 0]
        with without_autocast(place.device):
            return of_queries @ of_keys.T
