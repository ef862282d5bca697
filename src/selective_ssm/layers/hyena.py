"""The Hyena operator: long convolutions and gates in turns.

Legend: B batch, L length, D width of the model, N order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast, final

import torch
from torch import Tensor, nn

from selective_ssm.layers.checks import require_positive
from selective_ssm.layers.conv import CausalConv1d
from selective_ssm.layers.hyena_filter import HyenaFilter, HyenaFilterConfig
from selective_ssm.layers.linear import Linear
from selective_ssm.layers.mixer import Mixer, MixerConfig, State, reset_linear


@dataclass(frozen=True, kw_only=True)
class HyenaConfig(MixerConfig):
    """What a Hyena operator is made of.

    Args:
        order: N, how often a long convolution and a gate follow each other.
        d_conv: how many inputs the short convolution of the projections sees.
        filter: the long convolutions.
        bias: whether the projections have biases.
    """

    kind: ClassVar[str] = "hyena"

    order: int = 2
    d_conv: int = 3
    filter: HyenaFilterConfig = field(default_factory=HyenaFilterConfig)
    bias: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "order", "d_conv")


@final
class Hyena(Mixer):
    """out_proj(z^N) with z^0 = v and z^n = x^n · (h^n * z^{n-1}), where v, x^1, …, x^N = conv1d(in_proj(input)).

    The filters h^n are drawn by an MLP each, where the paper's are by one MLP with N times the outputs. A convolution
    looks at all that came before: so the state grows, by N numbers a channel and token (see `HyenaFilter`), beside the
    last inputs of the short convolution.

    Source: Poli et al., "Hyena Hierarchy" (arXiv 2302.10866), definition 3.1 and algorithms 1 to 3.

    Example:
        >>> block = Hyena(HyenaConfig(), d_model=8)
        >>> y, state = block(torch.randn(1, 5, 8), return_state=True)
        >>> y.shape, [tuple(part.shape) for part in state]
        (torch.Size([1, 5, 8]), [(1, 24, 2), (1, 5, 8), (1,), (1, 5, 8), (1,)])
    """

    def __init__(self, config: HyenaConfig, d_model: int) -> None:
        super().__init__()
        width = (config.order + 1) * d_model
        self.in_proj = Linear(d_model, width, bias=config.bias)
        self.conv1d = CausalConv1d(width, config.d_conv, bias=config.bias, activation=None)
        filters = nn.ModuleList(HyenaFilter(config.filter, d_model, d_model) for _ in range(config.order))
        self.filters = cast("Sequence[HyenaFilter]", filters)
        self.out_proj = Linear(d_model, d_model, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.in_proj, self.out_proj):
            reset_linear(linear)
        self.conv1d.reset_parameters()
        for long in self.filters:
            long.reset_parameters()

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        short = self.conv1d.init_state(batch, device, dtype)
        return sum((long.init_state(batch, device, dtype, max_length) for long in self.filters), short)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        before = None if state is None else state[0]
        x, short = self.conv1d(self.in_proj(x), before, cu_seqlens=cu_seqlens, return_state=return_state)
        y_BLD, *gates = x.chunk(len(self.filters) + 1, dim=-1)
        ends: State = ()
        for index, (long, gate_BLD) in enumerate(zip(self.filters, gates, strict=True)):
            own = None if state is None else _own(state, index)
            y_BLD, end = long(y_BLD, None, own, cu_seqlens=cu_seqlens, return_state=return_state)
            y_BLD = gate_BLD * y_BLD
            ends += end or ()
        return self.out_proj(y_BLD), (short, *ends) if return_state else None

    def step(self, x: Tensor, state: State, *, state_indices: Tensor | None = None) -> tuple[Tensor, State]:
        x = self.conv1d.step(self.in_proj(x), state[0], state_indices=state_indices)
        y_BD, *gates = x.chunk(len(self.filters) + 1, dim=-1)
        for index, (long, gate_BD) in enumerate(zip(self.filters, gates, strict=True)):
            y_BD = gate_BD * long.step(y_BD, None, _own(state, index), state_indices=state_indices)[0]
        return self.out_proj(y_BD), state


def _own(state: State, index: int) -> State:
    """The state of a long convolution: its inputs and their number."""
    return state[1 + 2 * index : 3 + 2 * index]
