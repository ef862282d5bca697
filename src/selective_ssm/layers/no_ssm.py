"""What stands in a block where an inner SSM would: nothing but the gate."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.layers.mixer import State
from selective_ssm.layers.ssm import InnerSSM


@final
class NoSSM(InnerSSM):
    """The identity, gated: x · SiLU(z), without parameters and state, so that no block has to ask what is in it.

    Example:
        >>> NoSSM()(torch.ones(1, 2, 3), torch.zeros(1, 2, 3))[0].any()
        tensor(False)
    """

    def reset_parameters(self) -> None:
        pass

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        return ()

    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        return self._gate(x, z), () if return_state else None

    def step(
        self, x: Tensor, z: Tensor | None, state: State, *, state_indices: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self._gate(x, z), ()

    def _gate(self, x: Tensor, z: Tensor | None) -> Tensor:
        return x if z is None else x * F.silu(z)
