"""RWKV-4's two layers: time mixing, an average over the past, and channel mixing, its MLP.

Legend: B batch, L length, D channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selective_ssm.errors import UserError
from selective_ssm.layers.checks import require_positive
from selective_ssm.layers.linear import Linear
from selective_ssm.layers.mixer import Mixer, MixerConfig, State, in_float32, reset_linear
from selective_ssm.layers.token_shift import shifted, shifted_step
from selective_ssm.ops.wkv import no_average, wkv, wkv_step


@dataclass(frozen=True, kw_only=True)
class _InDepthConfig(MixerConfig):
    """Base of the configs of RWKV's layers, which start otherwise from the first branch of a model to the last.

    Args:
        depth: where in the model the layer stands, from 0 (first) to 1 (last); only the initial values depend on it.
    """

    depth: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.depth <= 1:
            raise UserError(f"{self.kind}: depth must be from 0 (the first layer) to 1 (the last), got {self.depth}")


@dataclass(frozen=True, kw_only=True)
class RWKVConfig(_InDepthConfig):
    """What a time mixing is made of.

    Args:
        depth: where in the model the layer stands, from 0 (first) to 1 (last); only the initial values depend on it.
    """

    kind: ClassVar[str] = "rwkv"


@dataclass(frozen=True, kw_only=True)
class RWKVChannelConfig(_InDepthConfig):
    """What a channel mixing is made of.

    Args:
        depth: where in the model the layer stands, from 0 (first) to 1 (last); only the initial values depend on it.
        expansion: hidden width as a multiple of d_model.
    """

    kind: ClassVar[str] = "rwkv_channel"

    expansion: float = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "expansion")


@final
class RWKV(Mixer):
    """Time mixing: out_proj(σ(r_t) · wkv_t), an average of values over the past whose weights fade with age.

        r, k, v = W (μ x_t + (1 - μ) x_{t-1}), each with a W and a μ (D,) of its own
        wkv_t = Σ_{i<t} e^{k_i - (t-1-i) w} v_i + e^{k_t + u} v_t, over the same with 1 for v,  w = exp(fade_log)

    Its state is the last input and, for each channel, both sums and the unit that they are in: 3 numbers in fp32.

    Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048), section 3.1. Initial
        values are those of appendix E, but for the matrices, which start as Mamba's do.

    Example:
        >>> y, state = RWKV(RWKVConfig(), d_model=8)(torch.randn(2, 5, 8), return_state=True)
        >>> y.shape, [tuple(part.shape) for part in state]
        (torch.Size([2, 5, 8]), [(2, 8, 1), (2, 3, 8)])
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"mix_r", "mix_k", "mix_v", "fade_log", "bonus"})

    def __init__(self, config: RWKVConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.mix_r, self.mix_k, self.mix_v = (nn.Parameter(torch.empty(d_model)) for _ in range(3))
        self.r_proj, self.k_proj, self.v_proj = (Linear(d_model, d_model, bias=False) for _ in range(3))
        self.fade_log = nn.Parameter(torch.empty(d_model))
        self.bonus = nn.Parameter(torch.empty(d_model))
        self.out_proj = Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for linear in (self.r_proj, self.k_proj, self.v_proj, self.out_proj):
            reset_linear(linear)
        depth, place = self.config.depth, _places(self.bonus)
        self.mix_k.copy_(place ** (1 - depth))
        self.mix_v.copy_(place ** (1 - depth) + 0.3 * depth)
        self.mix_r.copy_(0.5 * place ** (1 - depth))
        self.fade_log.copy_(8 * place ** (0.7 + 1.3 * depth) - 5)
        zigzag = (torch.arange(len(place), device=place.device) + 1) % 3 - 1
        self.bonus.copy_(0.5 * zigzag + math.log(0.3))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        width = len(self.bonus)
        last = torch.zeros(batch, width, 1, device=device, dtype=dtype)
        return last, no_average(batch, width, device, dtype)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        last, before = self.init_state(sequences, x.device, x.dtype) if state is None else state
        previous, last = shifted(x, last, cu_seqlens=cu_seqlens, return_state=return_state)
        r, k, v = self._project(x, previous)
        y, after = wkv(k, v, *self._fades(), before, cu_seqlens)
        return self._gated(r, y), None if last is None else (last, after)

    def step(self, x: Tensor, state: State, *, state_indices: Tensor | None = None) -> tuple[Tensor, State]:
        last, average = state
        r, k, v = self._project(x, shifted_step(x, last, state_indices=state_indices))
        y = wkv_step(k, v, *self._fades(), average, state_indices)
        return self._gated(r, y), state

    def _project(self, x: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r, k, v = (
            linear(_mixed(mix, x, previous))
            for mix, linear in ((self.mix_r, self.r_proj), (self.mix_k, self.k_proj), (self.mix_v, self.v_proj))
        )
        return r, k, v

    def _fades(self) -> tuple[Tensor, Tensor]:
        return torch.exp(in_float32(self.fade_log)), in_float32(self.bonus)

    def _gated(self, r: Tensor, y: Tensor) -> Tensor:
        return self.out_proj(torch.sigmoid(r) * y)


@final
class RWKVChannel(Mixer):
    """Channel mixing: σ(r_t) · out_proj(relu(k_t)²), with r, k = W (μ x_t + (1 - μ) x_{t-1}).

    Source: Peng et al. (arXiv 2305.13048), section 3.1 and appendix E.

    Example:
        >>> y, state = RWKVChannel(RWKVChannelConfig(), d_model=8)(torch.randn(2, 5, 8), return_state=True)
        >>> y.shape, [tuple(part.shape) for part in state]
        (torch.Size([2, 5, 8]), [(2, 8, 1)])
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"mix_r", "mix_k"})

    def __init__(self, config: RWKVChannelConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        hidden = round(config.expansion * d_model)
        self.mix_r, self.mix_k = (nn.Parameter(torch.empty(d_model)) for _ in range(2))
        self.r_proj = Linear(d_model, d_model, bias=False)
        self.k_proj = Linear(d_model, hidden, bias=False)
        self.out_proj = Linear(hidden, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for linear in (self.r_proj, self.k_proj, self.out_proj):
            reset_linear(linear)
        for mix in (self.mix_r, self.mix_k):
            mix.copy_(_places(mix) ** (1 - self.config.depth))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        return (torch.zeros(batch, len(self.mix_r), 1, device=device, dtype=dtype),)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        before = None if state is None else state[0]
        previous, last = shifted(x, before, cu_seqlens=cu_seqlens, return_state=return_state)
        return self._mix(x, previous), None if last is None else (last,)

    def step(self, x: Tensor, state: State, *, state_indices: Tensor | None = None) -> tuple[Tensor, State]:
        return self._mix(x, shifted_step(x, state[0], state_indices=state_indices)), state

    def _mix(self, x: Tensor, previous: Tensor) -> Tensor:
        r, k = self.r_proj(_mixed(self.mix_r, x, previous)), self.k_proj(_mixed(self.mix_k, x, previous))
        return torch.sigmoid(r) * self.out_proj(F.relu(k).square())


def _mixed(mix: Tensor, x: Tensor, previous: Tensor) -> Tensor:
    """μ x_t + (1 - μ) x_{t-1}; under autocast the one that came through an operator is of lower precision."""
    return torch.lerp(previous, x.to(previous.dtype), mix.to(previous.dtype))


def _places(parameter: Tensor) -> Tensor:
    """Of each channel among all, from 0 to 1."""
    return torch.linspace(0, 1, len(parameter), dtype=parameter.dtype, device=parameter.device)
