"""The Mamba block: a gated branch around an inner SSM.

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
from selective_ssm.layers.norm import RMSNorm
from selective_ssm.layers.s6 import S6Config
from selective_ssm.layers.ssm import SSMConfig
from selective_ssm.layers.ssm_table import build_ssm


@dataclass(frozen=True, kw_only=True)
class MambaConfig(MixerConfig):
    """What a Mamba block is made of; the defaults are the released Mamba's.

    Args:
        expand: width of the block as a multiple of d_model.
        d_conv: how many inputs the convolution sees.
        conv_bias: whether the convolution has a bias.
        bias: whether in_proj and out_proj have biases.
        ssm: the inner SSM; None leaves it out, and a gated MLP with a convolution remains.
        ssm_norm: whether an RMSNorm stands between the SSM and the gate.
    """

    kind: ClassVar[str] = "mamba"

    expand: int = 2
    d_conv: int = 4
    conv_bias: bool = True
    bias: bool = False
    ssm: SSMConfig | None = field(default_factory=S6Config)
    ssm_norm: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "expand", "d_conv")


@final
class Mamba(Mixer):
    """The Mamba block: out_proj(SSM(SiLU(conv1d(x))) · SiLU(z)) with x, z = in_proj(input).

    The gate is fused into the SSM, except where a norm stands between the two.

    Source: Gu & Dao, "Mamba" (arXiv 2312.00752), section 3.4 and Figure 3.

    Example:
        >>> block = Mamba(MambaConfig(), d_model=8)
        >>> x = torch.randn(1, 5, 8)
        >>> y, state = block(x, return_state=True)
        >>> _, halfway = block(x[:, :3], return_state=True)
        >>> rest, _ = block(x[:, 3:], halfway)
        >>> torch.allclose(rest, y[:, 3:], atol=1e-5)
        True
    """

    def __init__(self, config: MambaConfig, d_model: int) -> None:
        super().__init__()
        width = config.expand * d_model
        self.in_proj = Linear(d_model, 2 * width, bias=config.bias)
        self.conv1d = CausalConv1d(width, config.d_conv, bias=config.conv_bias)
        self.ssm = build_ssm(config.ssm, width, d_model)
        self.norm = RMSNorm(width, eps=1e-5) if config.ssm_norm else None
        self.out_proj = Linear(width, d_model, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.in_proj, self.out_proj):
            reset_linear(linear)
        self.conv1d.reset_parameters()
        self.ssm.reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        return self.conv1d.init_state(batch, device, dtype) + self.ssm.init_state(batch, device, dtype, max_length)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        x_BLE, z_BLE = self.in_proj(x).chunk(2, dim=-1)
        conv_state, ssm_state = (None, None) if state is None else (state[0], state[1:])
        x_BLE, conv_state = self.conv1d(x_BLE, conv_state, cu_seqlens=cu_seqlens, return_state=return_state)
        fused_z = z_BLE if self.norm is None else None
        y_BLE, ssm_state = self.ssm(x_BLE, fused_z, ssm_state, cu_seqlens=cu_seqlens, return_state=return_state)
        return self._project(y_BLE, z_BLE), (conv_state, *ssm_state) if return_state else None

    def step(self, x: Tensor, state: State, *, state_indices: Tensor | None = None) -> tuple[Tensor, State]:
        x_BE, z_BE = self.in_proj(x).chunk(2, dim=-1)
        x_BE = self.conv1d.step(x_BE, state[0], state_indices=state_indices)
        fused_z = z_BE if self.norm is None else None
        y_BE, ssm_state = self.ssm.step(x_BE, fused_z, state[1:], state_indices=state_indices)
        return self._project(y_BE, z_BE), (state[0], *ssm_state)

    def _project(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(y if self.norm is None else self.norm(y) * F.silu(z))
