"""The long filter of Hyena as an inner SSM: a convolution as long as the sequence, whose filter a small MLP draws.

Legend: B batch, L length, D channels (the block's width), F features of a position, S rows, C capacity of a state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selective_ssm.errors import UserError
from selective_ssm.layers.cache import Reading, append, empty_cache
from selective_ssm.layers.checks import require_positive
from selective_ssm.layers.linear import Linear
from selective_ssm.layers.long_conv import causal_convolution, run_packed
from selective_ssm.layers.mixer import State, in_float32, reset_linear, without_autocast
from selective_ssm.layers.ssm import InnerSSM, SSMConfig
from selective_ssm.ops import checks
from selective_ssm.ops.slots import Slots


@dataclass(frozen=True, kw_only=True)
class HyenaFilterConfig(SSMConfig):
    """What a Hyena filter is made of.

    Args:
        filter_length: tokens over which a position t = l / filter_length runs from 0 to 1, the length that is trained
            on, say. The filter goes on beyond it, under a window that goes on to fall.
        bands: frequencies of the positional features, of which there are 1 + 2 bands.
        hidden: width of the MLP that makes the filter of them.
        depth: its linear maps, the last one included.
        sine_frequency: ω of its activation sin(ω x) at the start.
        slow_decay: t at which the window of the slowest channel has fallen to a hundredth.
        fast_decay: t at which that of the fastest has.
        window_floor: what the window falls to.
        skip: whether D·x is added to the output.
    """

    kind: ClassVar[str] = "hyena_filter"

    filter_length: int = 1024
    bands: int = 16
    hidden: int = 64
    depth: int = 4
    sine_frequency: float = 10.0
    slow_decay: float = 1.5
    fast_decay: float = 0.3
    window_floor: float = 0.01
    skip: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "filter_length", "bands", "hidden", "sine_frequency", "slow_decay", "fast_decay")
        if self.depth < 2:
            raise UserError(f"hyena_filter: depth must be at least 2, got {self.depth}")
        if self.window_floor < 0:
            raise UserError(f"hyena_filter: window_floor must not be negative, got {self.window_floor}")


@final
class HyenaFilter(InnerSSM):
    """y_t = sum_l K_l x_{t-l} + D x_t over all that came before, with K_l = window_l · MLP(features of l).

    The features of l are t = l / filter_length and cos and sin of 2π k t, k < bands; the MLP's activation is
    sin(ω x); the window is exp(-α t) + floor, α from slow to fast over the channels.

    A sequence is convolved by FFT. There is no state of constant size: a token's output is a sum over all inputs, which
    are cached, (B, C, D) and their number (B,), so that a step takes time and memory O(L), and draws the filter anew.
    `init_state` makes room for max_length tokens (none by default), and `forward` as much as its tokens need; `step`
    refuses a row that has none, as `Attention` does.

    Source: Poli et al., "Hyena Hierarchy" (arXiv 2302.10866), section 3.3, equation 7.

    Example:
        >>> long = HyenaFilter(HyenaFilterConfig(), width=6, d_model=3)
        >>> y, state = long(torch.randn(2, 5, 6), return_state=True)
        >>> y.shape, state[0].shape, state[1].tolist()
        (torch.Size([2, 5, 6]), torch.Size([2, 5, 6]), [5, 5])
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"frequency", "D"})

    def __init__(self, config: HyenaFilterConfig, width: int, d_model: int) -> None:
        super().__init__()
        self.config = config
        sizes = [1 + 2 * config.bands, *[config.hidden] * (config.depth - 1), width]
        last = config.depth - 1
        self.mlp = nn.ModuleList(Linear(*sizes[i : i + 2], bias=i < last) for i in range(config.depth))
        self.frequency = nn.Parameter(torch.empty(config.hidden))
        self.D = nn.Parameter(torch.empty(width)) if config.skip else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in self.mlp:
            reset_linear(cast("Linear", linear))
        nn.init.constant_(self.frequency, self.config.sine_frequency)
        if self.D is not None:
            nn.init.ones_(self.D)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, max_length: int | None = None) -> State:
        return empty_cache(batch, max_length, [(self._width,)], device, dtype)

    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        if cu_seqlens is not None:
            checks.cu_seqlens(cu_seqlens, *x.shape[:2])
        end = None
        if state is None and not return_state:
            y = self._convolve(x) if cu_seqlens is None else run_packed(self._run, x, None, cu_seqlens, False)[0]
        else:
            reading = Reading.of(x, state, cu_seqlens)
            inputs, after = reading.extend(state, x)
            y = reading.among(self._convolve(inputs[:, : reading.longest]))
            end = (inputs, after) if return_state else None
        y = y.to(x.dtype)
        return (y if z is None else y * F.silu(z)), end

    def step(
        self, x: Tensor, z: Tensor | None, state: State, *, state_indices: Tensor | None = None
    ) -> tuple[Tensor, State]:
        slots = Slots.named(state_indices, len(x), state[1])
        before = slots.take(state[1]).clone()
        (inputs,) = append(state, before, (x,), slots)
        lag = (before[:, None] - torch.arange(inputs.shape[1], device=x.device))[..., None]
        weights = self.kernel(inputs.shape[1]).T[lag[..., 0].clamp_min(0)].masked_fill(lag < 0, 0)
        wide = in_float32(x)
        y = (weights * inputs.to(wide.dtype)).sum(1)
        y = (y if self.D is None else y + self.D * wide).to(x.dtype)
        return (y if z is None else y * F.silu(z)), state

    def kernel(self, length: int) -> Tensor:
        """The filter K_l for l < length, (D, length), in fp32 at least."""
        device, dtype = self.frequency.device, self.frequency.dtype
        t = torch.arange(length, device=device, dtype=torch.float64)[:, None] / self.config.filter_length
        phases = 2 * math.pi * t * torch.arange(self.config.bands, device=device)
        hidden = torch.cat([t, phases.cos(), phases.sin()], 1).to(dtype)
        with without_autocast(device):
            for linear in self.mlp[:-1]:
                hidden = torch.sin(self.frequency * linear(hidden))
            shape = in_float32(self.mlp[-1](hidden))
        least, most = (math.log(100) / fallen for fallen in (self.config.slow_decay, self.config.fast_decay))
        rates = torch.linspace(least, most, self._width, device=device, dtype=torch.float64)
        window = torch.exp(-rates * t) + self.config.window_floor
        return (shape * window.to(shape.dtype)).T

    @property
    def _width(self) -> int:
        return cast("Linear", self.mlp[-1]).out_features

    def _run(self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool) -> tuple[Tensor, None]:
        return self._convolve(x), None

    def _convolve(self, x: Tensor) -> Tensor:
        """Rows (S, L, D) from nothing."""
        return causal_convolution(x, self.kernel(x.shape[1]), None if self.D is None else in_float32(self.D))
