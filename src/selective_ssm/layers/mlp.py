"""The MLP: a mixer of channels, without memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.errors import choice
from selective_ssm.layers.checks import require_positive
from selective_ssm.layers.linear import Linear
from selective_ssm.layers.mixer import Mixer, MixerConfig, State, reset_linear


@dataclass(frozen=True, kw_only=True)
class MLPConfig(MixerConfig):
    """What an MLP is made of; the defaults are the released gated MLP's (SwiGLU).

    GPT-3's is ``MLPConfig(expansion=4, activation="gelu", gated=False, bias=True)``.

    Args:
        expansion: hidden width as a multiple of d_model.
        multiple_of: the hidden width is rounded up to a multiple of this.
        activation: "silu" or "gelu".
        gated: whether the activation of one projection multiplies another.
        bias: whether the projections have biases.
    """

    kind: ClassVar[str] = "mlp"

    expansion: float = 8 / 3
    multiple_of: int = 128
    activation: Literal["silu", "gelu"] = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        choice("activation", self.activation, ("silu", "gelu"))
        require_positive(self, "expansion", "multiple_of")


@final
class MLP(Mixer):
    """out_proj(act(in_proj(x))), or gated, out_proj(u · act(v)) with u, v = in_proj(x).

    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).

    Example:
        >>> y, state = MLP(MLPConfig(), d_model=8)(torch.randn(2, 5, 8), return_state=True)
        >>> y.shape, state
        (torch.Size([2, 5, 8]), ())
    """

    def __init__(self, config: MLPConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        hidden = math.ceil(config.expansion * d_model / config.multiple_of) * config.multiple_of
        self.in_proj = Linear(d_model, 2 * hidden if config.gated else hidden, bias=config.bias)
        self.out_proj = Linear(hidden, d_model, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_linear(self.in_proj)
        reset_linear(self.out_proj)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        return ()

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        return self._mix(x), () if return_state else None

    def step(self, x: Tensor, state: State, *, state_indices: Tensor | None = None) -> tuple[Tensor, State]:
        return self._mix(x), ()

    def _mix(self, x: Tensor) -> Tensor:
        activation = F.silu if self.config.activation == "silu" else F.gelu
        hidden = self.in_proj(x)
        if not self.config.gated:
            return self.out_proj(activation(hidden))
        u, v = hidden.chunk(2, dim=-1)
        return self.out_proj(u * activation(v))
