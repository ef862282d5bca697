"""The shift SSM: a memory of the last N inputs, which is a short learned filter.

Legend: B batch, L length, D channels, N state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.layers.checks import require_positive
from selective_ssm.layers.conv import CausalConv1d
from selective_ssm.layers.mixer import State
from selective_ssm.layers.ssm import InnerSSM, SSMConfig


@dataclass(frozen=True, kw_only=True)
class ShiftConfig(SSMConfig):
    """What a shift SSM is made of.

    Args:
        d_state: N, how many inputs each output sees, its own included.
    """

    kind: ClassVar[str] = "shift"

    d_state: int = 64

    def __post_init__(self) -> None:
        require_positive(self, "d_state")


@final
class Shift(InnerSSM):
    """h_t = shift(h_{t-1}) + e_1 x_t, y_t = C h_t, where shift moves every number of the state down by one place.

    The state is thus the last N inputs and y_t = sum_k C_k x_{t-k}: a causal convolution, and run as such, with C_k as
    its weight N - 1 - k. N - 1 inputs are kept, as the last comes with the token. There is no skip: C_0 is one. GPU
    kernels keep the filter in registers, which suffice for some hundred taps.

    Source: Fu et al., "Hungry Hungry Hippos" (arXiv 2212.14052), section 3.1.

    Example:
        >>> shift = Shift(ShiftConfig(d_state=3), width=6, d_model=3)
        >>> y, state = shift(torch.randn(2, 5, 6), return_state=True)
        >>> y.shape, state[0].shape
        (torch.Size([2, 5, 6]), torch.Size([2, 6, 2]))
    """

    def __init__(self, config: ShiftConfig, width: int, d_model: int) -> None:
        super().__init__()
        self.conv1d = CausalConv1d(width, config.d_state, bias=False, activation=None)

    def reset_parameters(self) -> None:
        self.conv1d.reset_parameters()

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        return self.conv1d.init_state(batch, device, dtype)

    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        before = None if state is None else state[0]
        y, end = self.conv1d(x, before, cu_seqlens=cu_seqlens, return_state=return_state)
        return (y if z is None else y * F.silu(z)), (end,) if return_state else None

    def step(
        self, x: Tensor, z: Tensor | None, state: State, *, state_indices: Tensor | None = None
    ) -> tuple[Tensor, State]:
        y = self.conv1d.step(x, state[0], state_indices=state_indices)
        return (y if z is None else y * F.silu(z)), state
