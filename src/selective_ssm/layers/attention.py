"""Attention, multi-head or grouped: a mixer whose state is all it has read.

Legend: B batch, L length, H heads, G key heads, P head dim, C capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from selective_ssm.errors import UserError, choice
from selective_ssm.layers.attend import attend, attend_packed, runs_packed
from selective_ssm.layers.cache import Reading, append, empty_cache
from selective_ssm.layers.checks import require_positive
from selective_ssm.layers.linear import Linear
from selective_ssm.layers.mixer import Mixer, MixerConfig, State, reset_linear
from selective_ssm.layers.rotary import rotate
from selective_ssm.ops import checks
from selective_ssm.ops.sequences import token_positions
from selective_ssm.ops.slots import Slots


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """What an attention is made of; the defaults are Vaswani et al.'s.

    Args:
        n_heads: number of heads H.
        n_kv_heads: number of heads G of keys and values, each shared by H / G heads (1: multi-query); None is H.
        head_dim: width P of a head; None is d_model / n_heads.
        positions: "none", as where the model has learned ones (`LanguageModelConfig.max_positions`) or other layers
            tell the order; "rope", rotations; "xpos", rotations and a decay.
        rope_base: base of the rotations' angles.
        bias: whether in_proj and out_proj have biases.
    """

    kind: ClassVar[str] = "attention"

    n_heads: int = 8
    n_kv_heads: int | None = None
    head_dim: int | None = None
    positions: Literal["none", "rope", "xpos"] = "none"
    rope_base: float = 10000.0
    bias: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "n_heads", "n_kv_heads", "head_dim", "rope_base")
        choice("positions", self.positions, ("none", "rope", "xpos"))
        if self.n_heads % (self.n_kv_heads or 1):
            raise UserError(f"attention: n_kv_heads must divide n_heads = {self.n_heads}, got {self.n_kv_heads}")

    def width(self, d_model: int) -> int:
        """P in a model of that width."""
        if self.head_dim is None and d_model % self.n_heads:
            raise UserError(
                f"attention: n_heads must divide d_model = {d_model} or head_dim be given, got {self.n_heads}"
            )
        width = self.head_dim or d_model // self.n_heads
        if self.positions != "none" and width % 2:
            raise UserError(f"attention: {self.positions} turns pairs: head_dim must be even, got {width}")
        return width


@final
class Attention(Mixer):
    """Causal softmax attention: out_proj of y_t = Σ_{m ≤ t} softmax_m(q_t·k_m / √P) v_m, with q, k, v = in_proj(input).

    Its state is a cache of keys and values, (B, C, G, P) each, and their number (B,). `init_state` makes room for
    max_length tokens (none by default). `forward` returns a state with as much room as it was given, or what the tokens
    need if that is more; `step` writes into the room and refuses a row that has none: on a CPU. Elsewhere it does not
    wait to see, and such a row's token is not kept.

    Keys are cached as turned by their positions, without xPos's decay, which is relative to who asks.

    Source: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), section 3.2.2.

    Example:
        >>> attention = Attention(AttentionConfig(n_heads=2, positions="rope"), d_model=8)
        >>> x = torch.randn(1, 5, 8)
        >>> start = attention.init_state(1, x.device, x.dtype, max_length=5)
        >>> y, state = attention(x[:, :4], start, return_state=True)
        >>> with torch.no_grad():
        ...     last, state = attention.step(x[:, 4], state)
        >>> torch.allclose(last, attention(x)[0][:, 4], atol=1e-5), state[0].shape, state[2].tolist()
        (True, torch.Size([1, 5, 2, 4]), [5])
    """

    def __init__(self, config: AttentionConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.width(d_model)
        key_heads = config.n_kv_heads or config.n_heads
        self._heads = (config.n_heads, key_heads, key_heads)
        self.in_proj = Linear(d_model, sum(self._heads) * self.head_dim, bias=config.bias)
        self.out_proj = Linear(config.n_heads * self.head_dim, d_model, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_linear(self.in_proj)
        reset_linear(self.out_proj)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        return empty_cache(batch, max_length, [(heads, self.head_dim) for heads in self._heads[1:]], device, dtype)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        if cu_seqlens is not None:
            checks.cu_seqlens(cu_seqlens, *x.shape[:2])
        before = None if state is None else state[2]
        q, k, v = self._project(x, token_positions(before, x.shape[1], cu_seqlens, x.device))
        if cu_seqlens is not None and state is None and not return_state and not self._fades and runs_packed(q):
            return self._answer(attend_packed(q[0], k[0], v[0], cu_seqlens)[None]), None
        reading = Reading.of(x, state, cu_seqlens)
        keys, values, _ = end = reading.extend(state, k, v)
        y = self._attend(reading.spread(q), keys, values, reading.before, reading.earlier)
        return self._answer(reading.join(y)), end if return_state else None

    def step(self, x: Tensor, state: State, *, state_indices: Tensor | None = None) -> tuple[Tensor, State]:
        slots = Slots.named(state_indices, len(x), state[2])
        before = slots.take(state[2]).clone()
        q, k, v = self._project(x[:, None], before[:, None])
        keys, values = append(state, before, (k[:, 0], v[:, 0]), slots)
        y = self._attend(q, keys, values, before, keys.shape[1] - 1)
        return self._answer(y[:, 0]), state

    @property
    def _fades(self) -> bool:
        return self.config.positions == "xpos"

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, L, H, P), keys and values (B, L, G, P), turned by positions (B, L) where the config says so."""
        heads = self.in_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.config.positions == "none":
            return heads.split(self._heads, dim=-2)
        queries, keys, values = self._heads
        turned, v = heads.split((queries + keys, values), dim=-2)
        q, k = rotate(turned, positions, self.config.rope_base).split((queries, keys), dim=-2)
        return q, k, v

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, before: Tensor, earlier: int) -> Tensor:
        return attend(q, keys.to(q.dtype), values.to(q.dtype), before, earlier, xpos=self._fades)

    def _answer(self, y: Tensor) -> Tensor:
        """(…, H, P) -> (…, d_model)."""
        return self.out_proj(y.flatten(-2))
