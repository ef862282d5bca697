"""The short causal convolution, as a module.

Legend: B batch, L length, D channels, K width of the convolution.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from selective_ssm.layers.mixer import State
from selective_ssm.ops import causal_conv1d, causal_conv1d_step


class CausalConv1d(nn.Module):
    """Depthwise causal convolution and what follows it; its state is the last K - 1 inputs.

    Args:
        width: channels D.
        kernel: K, how many inputs each output sees, its own included.
        bias: whether a bias is added.
        activation: "silu", or None.
    """

    def __init__(self, width: int, kernel: int, *, bias: bool, activation: Literal["silu"] | None = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(width, kernel))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and bias uniform within 1/sqrt(K), as ``nn.Conv1d`` draws them."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        """No inputs seen: zeros (B, D, K - 1)."""
        width, kernel = self.weight.shape
        return (torch.zeros(batch, width, kernel - 1, device=device, dtype=dtype),)

    def forward(
        self, x: Tensor, state: Tensor | None, *, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve x (B, L, D), going on from a state (B, D, K - 1); the arguments are those of `Mixer.forward`."""
        result = causal_conv1d(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            return_final_state=return_state,
        )
        return result if isinstance(result, tuple) else (result, None)

    def step(self, x: Tensor, state: Tensor, *, state_indices: Tensor | None) -> Tensor:
        """Convolve one token a row, x (B, D); the state is updated in place."""
        return causal_conv1d_step(
            state, x, self.weight, self.bias, activation=self.activation, state_indices=state_indices
        )
