"""The block without a gate: an SSM between two projections.

Legend: B batch, L length, E expanded width, K width of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.layers.checks import require_positive
from selective_ssm.layers.conv import CausalConv1d
from selective_ssm.layers.linear import Linear
from selective_ssm.layers.mixer import Mixer, MixerConfig, State, reset_linear
from selective_ssm.layers.s4 import S4Config
from selective_ssm.layers.ssm import SSMConfig
from selective_ssm.layers.ssm_table import build_ssm


@dataclass(frozen=True, kw_only=True)
class PlainConfig(MixerConfig):
    """What a plain block is made of.

    Args:
        expand: width of the block as a multiple of d_model.
        d_conv: how many inputs a convolution in front of the SSM sees; None for no convolution.
        bias: whether in_proj, the convolution and out_proj have biases.
        ssm: the inner SSM.
    """

    kind: ClassVar[str] = "plain"

    expand: int = 1
    d_conv: int | None = None
    bias: bool = True
    ssm: SSMConfig = field(default_factory=S4Config)

    def __post_init__(self) -> None:
        require_positive(self, "expand", "d_conv")


@final
class Plain(Mixer):
    """out_proj(GELU(SSM(in_proj(input)))), with SiLU(conv1d(…)) in front of the SSM where asked for.

    It is the row "no gate" of the Mamba paper's Table 1, whose SSM is S4 or S6. S4's own layer is linear, SSM,
    activation, linear, as wide as the model: so there is neither expansion nor convolution unless asked for, and what
    the row lacks beside H3 and Mamba is every product of two functions of the input but for those inside the SSM.

    Source: Gu, Goel & Ré (arXiv 2111.00396), section 3.4; Gu & Dao, "Mamba" (arXiv 2312.00752), Table 1.

    Example:
        >>> y, state = Plain(PlainConfig(), d_model=8)(torch.randn(1, 5, 8), return_state=True)
        >>> y.shape, state[0].shape
        (torch.Size([1, 5, 8]), torch.Size([1, 8, 32]))
    """

    def __init__(self, config: PlainConfig, d_model: int) -> None:
        super().__init__()
        width = config.expand * d_model
        self.in_proj = Linear(d_model, width, bias=config.bias)
        self.conv1d = None if config.d_conv is None else CausalConv1d(width, config.d_conv, bias=config.bias)
        self.ssm = build_ssm(config.ssm, width, d_model)
        self.out_proj = Linear(width, d_model, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.in_proj, self.out_proj):
            reset_linear(linear)
        if self.conv1d is not None:
            self.conv1d.reset_parameters()
        self.ssm.reset_parameters()

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        own = () if self.conv1d is None else self.conv1d.init_state(batch, device, dtype)
        return own + self.ssm.init_state(batch, device, dtype, max_length)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        x_BLE = self.in_proj(x)
        own: State = ()
        ssm_state = state
        if self.conv1d is not None:
            conv_state, ssm_state = (None, None) if state is None else (state[0], state[1:])
            x_BLE, conv_state = self.conv1d(x_BLE, conv_state, cu_seqlens=cu_seqlens, return_state=return_state)
            own = (conv_state,)
        y_BLE, ssm_state = self.ssm(x_BLE, None, ssm_state, cu_seqlens=cu_seqlens, return_state=return_state)
        return self.out_proj(F.gelu(y_BLE)), (*own, *ssm_state) if return_state else None

    def step(self, x: Tensor, state: State, *, state_indices: Tensor | None = None) -> tuple[Tensor, State]:
        x_BE = self.in_proj(x)
        own: State = ()
        ssm_state = state
        if self.conv1d is not None:
            own, ssm_state = state[:1], state[1:]
            x_BE = self.conv1d.step(x_BE, own[0], state_indices=state_indices)
        y_BE, ssm_state = self.ssm.step(x_BE, None, ssm_state, state_indices=state_indices)
        return self.out_proj(F.gelu(y_BE)), (*own, *ssm_state)
