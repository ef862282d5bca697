"""The H3 block: a shift SSM and another SSM between two gates.

Legend: B batch, L length, D width of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from selective_ssm.layers.checks import require_positive
from selective_ssm.layers.linear import Linear
from selective_ssm.layers.mixer import Mixer, MixerConfig, State, reset_linear
from selective_ssm.layers.s4d import S4DConfig
from selective_ssm.layers.shift import Shift, ShiftConfig
from selective_ssm.layers.ssm import SSMConfig
from selective_ssm.layers.ssm_table import build_ssm


@dataclass(frozen=True, kw_only=True)
class H3Config(MixerConfig):
    """What an H3 block is made of.

    Args:
        d_shift: how many inputs the shift SSM sees, which is the size of its state.
        ssm: the SSM after it; the paper's is diagonal.
        bias: whether in_proj and out_proj have biases.
    """

    kind: ClassVar[str] = "h3"

    d_shift: int = 64
    ssm: SSMConfig = field(default_factory=S4DConfig)
    bias: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "d_shift")


@final
class H3(Mixer):
    """out_proj(q · SSM(shift(k) · v)) with q, k, v = in_proj(input), products element by element.

    This is the paper's block with heads of one channel each. Wider heads take the outer product of k and v within a
    head, and so as many states a channel as a head is wide; they are not offered.

    Source: Fu et al., "Hungry Hungry Hippos" (arXiv 2212.14052), section 3.1 and algorithm 1.

    Example:
        >>> block = H3(H3Config(d_shift=4), d_model=8)
        >>> y, state = block(torch.randn(1, 5, 8), return_state=True)
        >>> y.shape, [tuple(part.shape) for part in state]
        (torch.Size([1, 5, 8]), [(1, 8, 3), (1, 8, 32)])
    """

    def __init__(self, config: H3Config, d_model: int) -> None:
        super().__init__()
        self.in_proj = Linear(d_model, 3 * d_model, bias=config.bias)
        self.shift = Shift(ShiftConfig(d_state=config.d_shift), d_model, d_model)
        self.ssm = build_ssm(config.ssm, d_model, d_model)
        self.out_proj = Linear(d_model, d_model, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.in_proj, self.out_proj):
            reset_linear(linear)
        self.shift.reset_parameters()
        self.ssm.reset_parameters()

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        return self.shift.init_state(batch, device, dtype) + self.ssm.init_state(batch, device, dtype, max_length)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        q_BLD, k_BLD, v_BLD = self.in_proj(x).chunk(3, dim=-1)
        shift_state, ssm_state = (None, None) if state is None else (state[:1], state[1:])
        k_BLD, shift_state = self.shift(k_BLD, None, shift_state, cu_seqlens=cu_seqlens, return_state=return_state)
        y_BLD, ssm_state = self.ssm(k_BLD * v_BLD, None, ssm_state, cu_seqlens=cu_seqlens, return_state=return_state)
        return self.out_proj(q_BLD * y_BLD), (*shift_state, *ssm_state) if return_state else None

    def step(self, x: Tensor, state: State, *, state_indices: Tensor | None = None) -> tuple[Tensor, State]:
        q_BD, k_BD, v_BD = self.in_proj(x).chunk(3, dim=-1)
        k_BD, shift_state = self.shift.step(k_BD, None, state[:1], state_indices=state_indices)
        y_BD, ssm_state = self.ssm.step(k_BD * v_BD, None, state[1:], state_indices=state_indices)
        return self.out_proj(q_BD * y_BD), (*shift_state, *ssm_state)
