"""RetNet's multi-scale retention: attention without a softmax that decays, and so has a state of constant size.

Legend: B batch, L length, H heads, P head dim of queries and keys, E of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selective_ssm.errors import UserError
from selective_ssm.layers.checks import require_positive
from selective_ssm.layers.linear import Linear
from selective_ssm.layers.mixer import Mixer, MixerConfig, State, in_float32, reset_linear
from selective_ssm.layers.retention import retain, retain_step
from selective_ssm.layers.rotary import rotate
from selective_ssm.ops import checks
from selective_ssm.ops.sequences import token_positions
from selective_ssm.ops.slots import Slots


@dataclass(frozen=True, kw_only=True)
class RetNetConfig(MixerConfig):
    """What a retention is made of; the defaults are the paper's of 1.3B parameters.

    Args:
        n_heads: number of heads H, each of a decay of its own.
        head_dim: width P of a head's queries and keys; None is d_model / n_heads.
        expand: width of a head's values as a multiple of P.
        chunk: how many tokens are looked at together; the result is the same, time and memory are not.
        bias: whether in_proj and out_proj have biases.
    """

    kind: ClassVar[str] = "retnet"

    n_heads: int = 8
    head_dim: int | None = None
    expand: int = 2
    chunk: int = 128
    bias: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "n_heads", "head_dim", "expand", "chunk")

    def width(self, d_model: int) -> int:
        """P in a model of that width."""
        if self.head_dim is None and d_model % self.n_heads:
            raise UserError(f"retnet: n_heads must divide d_model = {d_model} or head_dim be given, got {self.n_heads}")
        width = self.head_dim or d_model // self.n_heads
        if width % 2:
            raise UserError(f"retnet: rotations turn pairs: head_dim must be even, got {width}")
        return width


@final
class RetNet(Mixer):
    """Multi-scale retention: out_proj(SiLU(g) · GroupNorm(y)), y_t = Σ_{m ≤ t} γ^(t-m) (q_t·k_m / √P) v_m a head.

    q and k are turned by their positions as in RoPE, and γ = 1 - 2^(-5-h) for head h. The same map is a recurrence,
    S_t = γ S_{t-1} + k_t v_tᵀ, y_t = q_t S_t / √P, of which `step` is one; `forward` cuts sequences into chunks, inside
    which it is the sum above, and between which states are handed on. A group of the norm is a head of one token.

    The state is S (B, H, P, E), in fp32 at least, and the number of tokens (B,), from which the next is turned.

    The paper scales scores twice more, by the root of the sum of decays and by their own sum, for precision alone: the
    norm undoes both, and neither is done here.

    Source: Sun et al., "Retentive Network" (arXiv 2307.08621), equations 5 to 8.

    Example:
        >>> retnet = RetNet(RetNetConfig(n_heads=2), d_model=8)
        >>> y, state = retnet(torch.randn(1, 5, 8), return_state=True)
        >>> y.shape, state[0].shape, state[1].tolist()
        (torch.Size([1, 5, 8]), torch.Size([1, 2, 4, 8]), [5])
    """

    def __init__(self, config: RetNetConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        heads, self.head_dim = config.n_heads, config.width(d_model)
        narrow, wide = heads * self.head_dim, heads * self.head_dim * config.expand
        self._sizes = (2 * narrow, wide, wide)  # of queries and keys, of values, of the gate
        self.in_proj = Linear(d_model, sum(self._sizes), bias=config.bias)
        self.norm = nn.GroupNorm(heads, wide)
        self.out_proj = Linear(wide, d_model, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_linear(self.in_proj)
        reset_linear(self.out_proj)
        self.norm.reset_parameters()

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        shape = (batch, self.config.n_heads, self.head_dim, self.head_dim * self.config.expand)
        return torch.zeros(shape, device=device, dtype=wide), torch.zeros(batch, device=device, dtype=torch.int64)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        if cu_seqlens is not None:
            checks.cu_seqlens(cu_seqlens, *x.shape[:2])
        sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        before = None if state is None else state[1]
        q, k, v, gate = self._project(x, token_positions(before, x.shape[1], cu_seqlens, x.device))
        initial, read = self.init_state(sequences, x.device, x.dtype) if state is None else state
        y, last = retain(q, k, v, initial, cu_seqlens, self.config.chunk)
        read = read + (x.shape[1] if cu_seqlens is None else cu_seqlens.diff())
        return self._answer(y, gate), (last, read) if return_state else None

    def step(self, x: Tensor, state: State, *, state_indices: Tensor | None = None) -> tuple[Tensor, State]:
        slots = Slots.named(state_indices, len(x), state[1])
        held, read = (slots.take(part) for part in state)
        q, k, v, gate = self._project(x[:, None], read[:, None])
        y = retain_step(q[:, 0], k[:, 0], v[:, 0], held)
        slots.put(state[0], held)
        slots.put(state[1], read + 1)
        return self._answer(y, gate[:, 0]), state

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys (B, L, H, P), turned by positions (B, L), values (B, L, H, E) and the gate (B, L, H E)."""
        turned, v, gate = self.in_proj(x).split(self._sizes, dim=-1)
        q, k = rotate(turned.unflatten(-1, (-1, self.head_dim)), positions).chunk(2, dim=-2)
        return q, k, v.unflatten(-1, (self.config.n_heads, -1)), gate

    def _answer(self, y: Tensor, gate: Tensor) -> Tensor:
        """(…, H, E) and (…, H E) -> (…, d_model)."""
        weight, bias = in_float32(self.norm.weight), in_float32(self.norm.bias)
        rows = in_float32(y).flatten(-2).flatten(0, -2)
        normed = F.group_norm(rows, self.config.n_heads, weight, bias, self.norm.eps)
        return self.out_proj(normed.view_as(gate).to(gate.dtype) * F.silu(gate))
