"""S6, the selective state space model, with every switch of the paper's ablations.

Legend: B batch, L length, D channels (the block's width), N state, R rank of delta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from selective_ssm.errors import UserError, choice
from selective_ssm.layers.checks import require_positive
from selective_ssm.layers.diagonal import DiagonalConfig, diagonal, pairs_as_complex, zero_delta
from selective_ssm.layers.linear import Linear
from selective_ssm.layers.mixer import State, in_float32, reset_linear
from selective_ssm.layers.norm import rms_normed
from selective_ssm.layers.ssm import InnerSSM
from selective_ssm.ops import selective_scan, selective_scan_step


@dataclass(frozen=True, kw_only=True)
class S6Config(DiagonalConfig):
    """What an S6 is made of; the defaults are the released Mamba's.

    Args:
        d_state: real numbers of state a channel (Table 10); a complex state counts two.
        dt_rank: rank R of the projection to Δ (Table 9), from 1 to the block's width; "auto" is ⌈d_model / 16⌉.
        selective_delta: whether Δ depends on the input (Table 7); if not, Δ = softplus(dt_bias).
        selective_B: whether B depends on the input; if not, it is a parameter (D, N).
        selective_C: whether C depends on the input; if not, it is a parameter (D, N).
        a_init: how A starts (Table 8): "s4d_real" A_n = -(n + 1), "random" A_n = -exp(normal), or the complex "s4d_lin"
            A_n = -1/2 + n i.
        discretization: "euler" (B̄ = ΔB, as in released checkpoints) or "zoh" (exact).
        skip: whether D·x is added to the output.
        dt_min: smallest Δ that dt_bias is drawn for.
        dt_max: largest such Δ.
        dt_init_floor: bound below which no such draw may fall.
        norm_eps: what RMSNorms without weights, of those of B, C and the R numbers of Δ that depend on the input, add
            to a mean of squares, as in FalconMamba; None is no such norms.
    """

    kind: ClassVar[str] = "s6"

    d_state: int = 16
    dt_rank: int | Literal["auto"] = "auto"
    selective_delta: bool = True
    selective_B: bool = True
    selective_C: bool = True
    a_init: Literal["s4d_real", "random", "s4d_lin"] = "s4d_real"
    discretization: Literal["euler", "zoh"] = "euler"
    dt_init_floor: float = 1e-4
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        choice("a_init", self.a_init, ("s4d_real", "random", "s4d_lin"))
        super().__post_init__()
        require_positive(self, "dt_init_floor", "norm_eps")
        if self.dt_rank != "auto":
            require_positive(self, "dt_rank")

    @property
    def is_complex(self) -> bool:
        return self.a_init == "s4d_lin"


@final
class S6(InnerSSM):
    """Selective SSM: (Δ, B, C) are functions of the input.

    Δ_t = softplus(dt_bias + dt_proj(x_t)), where dt_proj reads R of x_proj's outputs and B_t, C_t are the others;
    h_t = exp(Δ_t A) h_{t-1} + B̄_t x_t; y_t = C_t h_t + D x_t, gated as y_t · SiLU(z_t). A = -exp(A_log) (+ i A_imag).
    With `norm_eps`, each of x_proj's three outputs is normalised before it is used.

    The bias of Δ is a parameter beside dt_proj rather than in it, so that the scan adds it in fp32 and once, whatever
    adapter or quantised layer stands in dt_proj's place.

    Source: Gu & Dao, "Mamba" (arXiv 2312.00752), Algorithm 2 and section 3.6; the norms: Zuo et al., "Falcon Mamba"
    (arXiv 2410.05355).

    Example:
        >>> s6 = S6(S6Config(d_state=4), width=6, d_model=3)
        >>> y, state = s6(torch.randn(2, 5, 6), return_state=True)
        >>> y.shape, state[0].shape
        (torch.Size([2, 5, 6]), torch.Size([2, 6, 4]))
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"A_log", "A_imag", "B", "C", "D", "dt_bias"})

    def __init__(self, config: S6Config, width: int, d_model: int) -> None:
        super().__init__()
        self.config = config
        rank = math.ceil(d_model / 16) if config.dt_rank == "auto" else config.dt_rank
        if rank > width:
            raise UserError(f"s6: dt_rank must be at most the {width} channels of the block, got {rank}")
        n = config.d_state
        self._sizes = (rank * config.selective_delta, n * config.selective_B, n * config.selective_C)
        self.A_log = nn.Parameter(torch.empty(width, config.states))
        self.A_imag = nn.Parameter(torch.empty(width, config.states)) if config.is_complex else None
        self.x_proj = Linear(width, sum(self._sizes), bias=False) if any(self._sizes) else None
        self.dt_proj = Linear(rank, width, bias=False) if config.selective_delta else None
        self.dt_bias = nn.Parameter(torch.empty(width))
        self.B = None if config.selective_B else nn.Parameter(torch.empty(width, n))
        self.C = None if config.selective_C else nn.Parameter(torch.empty(width, n))
        self.D = nn.Parameter(torch.empty(width)) if config.skip else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the released code does; a fixed B starts at 1, a fixed C normal."""
        config = self.config
        n = torch.arange(self.A_log.shape[1], dtype=self.A_log.dtype, device=self.A_log.device)
        if config.a_init == "random":
            nn.init.normal_(self.A_log)
        else:
            self.A_log.copy_(torch.log(n + 1).expand_as(self.A_log))
        if self.A_imag is not None:
            nn.init.constant_(self.A_log, math.log(0.5))
            self.A_imag.copy_(n.expand_as(self.A_imag))
        if self.x_proj is not None:
            reset_linear(self.x_proj)
        if self.dt_proj is not None:
            bound = self.dt_proj.in_features**-0.5
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        nn.init.uniform_(self.dt_bias, math.log(config.dt_min), math.log(config.dt_max))
        dt = self.dt_bias.exp().clamp(min=config.dt_init_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        if self.B is not None:
            nn.init.ones_(self.B)
            if config.is_complex:
                self.B[:, 1::2] = 0
        if self.C is not None:
            nn.init.normal_(self.C)
        if self.D is not None:
            nn.init.ones_(self.D)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        return self.config.zero_state(batch, len(self.A_log), device, dtype)

    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        delta, B, C = self._select(x)
        result = selective_scan(
            x,
            delta,
            diagonal(self.A_log, self.A_imag),
            B,
            C,
            self._skip(),
            z,
            in_float32(self.dt_bias),
            delta_softplus=True,
            initial_state=None if state is None else state[0],
            cu_seqlens=cu_seqlens,
            discretization=self.config.discretization,
            return_final_state=return_state,
        )
        return (result[0], (result[1],)) if isinstance(result, tuple) else (result, None)

    def step(
        self, x: Tensor, z: Tensor | None, state: State, *, state_indices: Tensor | None = None
    ) -> tuple[Tensor, State]:
        delta, B, C = self._select(x)
        if not (self.config.selective_B and self.config.selective_C):
            B, C = (_per_channel(matrix, x, fixed is not None) for matrix, fixed in ((B, self.B), (C, self.C)))
        y = selective_scan_step(
            state[0],
            x,
            delta,
            diagonal(self.A_log, self.A_imag),
            B,
            C,
            self._skip(),
            z,
            in_float32(self.dt_bias),
            delta_softplus=True,
            discretization=self.config.discretization,
            state_indices=state_indices,
        )
        return y, state

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Δ before its bias (…, D), B and C (…, N) or (D, N), each from the input or fixed."""
        projected: Tensor = x[..., :0] if self.x_proj is None else self.x_proj(x)
        low_rank, B, C = projected.split(self._sizes, dim=-1)
        if (eps := self.config.norm_eps) is not None:
            low_rank, B, C = (rms_normed(part, eps) for part in (low_rank, B, C))
        delta = zero_delta(x) if self.dt_proj is None else self.dt_proj(low_rank)
        B, C = (B if self.B is None else self.B), (C if self.C is None else self.C)
        return (delta, pairs_as_complex(B), pairs_as_complex(C)) if self.config.is_complex else (delta, B, C)

    def _skip(self) -> Tensor | None:
        return None if self.D is None else in_float32(self.D)


def _per_channel(matrix: Tensor, x: Tensor, is_fixed: bool) -> Tensor:
    """(D, N) or (B, N) as (B, D, N): a step of B = D rows could not tell the one from the other."""
    rows, width = x.shape
    return matrix.expand(rows, -1, -1) if is_fixed else matrix[:, None].expand(-1, width, -1)
