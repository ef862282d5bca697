"""The mixers of transformers' Mamba and FalconMamba on this library's operators.

Legend: B batch, L length, E width of the block, K width of the convolution, N state.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selective_ssm.errors import require
from selective_ssm.interop.transformers.padding import Padding
from selective_ssm.layers.diagonal import diagonal
from selective_ssm.layers.linear import Linear
from selective_ssm.layers.mixer import in_float32
from selective_ssm.ops import causal_conv1d, causal_conv1d_step, linear, selective_scan, selective_scan_step

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class FastMixer:
    """What stands before their mixer in a class of both: its parameters and its cache, our maths.

    The cache holds what theirs does, the last K inputs of the convolution and the scan's state, so that either can go
    on from the other's. Of the K inputs we keep K - 1, as the oldest is never read again.
    """

    in_proj: nn.Module
    conv1d: nn.Conv1d
    x_proj: nn.Module
    dt_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter
    out_proj: nn.Module
    act: nn.Module
    activation: str
    layer_idx: int
    conv_kernel_size: int
    time_step_rank: int
    ssm_state_size: int

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Mix (B, L, d_model), going on from the cache, which is updated; arguments as in transformers."""
        batch, length, _ = hidden_states.shape
        padding = Padding.of(attention_mask, batch, length)
        states = None if cache_params is None else self._states(cache_params)
        # Steps carry no gradient, and leave no padding out.
        if states is not None and length == 1 and padding is None and not torch.is_grad_enabled():
            return self._step(hidden_states[:, 0], *states)[:, None].to(hidden_states.dtype)
        x = hidden_states if padding is None else padding.pack(hidden_states)
        y, conv_state, ssm_state = self._scan(x, states, padding)
        if cache_params is not None:
            width = self.conv_kernel_size
            cache_params.update_conv_state(F.pad(conv_state, (1, 0)), self.layer_idx, conv_kernel_size=width)
            cache_params.update_recurrent_state(ssm_state, self.layer_idx)
        y = y if padding is None else padding.unpack(y)
        return y.to(hidden_states.dtype)

    def _states(self, cache_params: Cache) -> tuple[Tensor, Tensor] | None:
        """The convolution's last K - 1 inputs (B, E, K - 1) and the scan's state (B, E, N), in the cache's memory."""
        conv_state = cache_params.get_conv_state(self.layer_idx)
        ssm_state = cache_params.get_recurrent_state(self.layer_idx)
        if conv_state is None or ssm_state is None:
            return None
        return conv_state[..., conv_state.shape[-1] - self.conv_kernel_size + 1 :], ssm_state

    def _scan(
        self, x: Tensor, states: tuple[Tensor, Tensor] | None, padding: Padding | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Whole sequences (B, L, d_model), or a pack of them; the states after each sequence too."""
        conv_state, ssm_state = (None, None) if states is None else states
        if torch.is_grad_enabled():  # the backward pass reads them after the cache has been written to
            conv_state, ssm_state = _clone(conv_state), _clone(ssm_state)
        cu_seqlens = None
        if padding is not None:
            cu_seqlens = padding.cu_seqlens
            conv_state, ssm_state = _with_one_more(conv_state), _with_one_more(ssm_state)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, conv_state = causal_conv1d(
            x,
            *self._filter(),
            activation=self._fused_activation,
            initial_state=conv_state,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        x = self._activated(x)
        delta, B, C, bias = self._select(x)
        y, ssm_state = selective_scan(
            x,
            delta,
            diagonal(self.A_log, None),
            B,
            C,
            in_float32(self.D),
            z,
            bias,
            delta_softplus=True,
            initial_state=ssm_state,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        if padding is not None:
            conv_state, ssm_state = conv_state[:-1], ssm_state[:-1]
        return self.out_proj(y), conv_state, ssm_state

    def _step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """One token a row, (B, d_model); the states are updated in place."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = self._activated(causal_conv1d_step(conv_state, x, *self._filter(), activation=self._fused_activation))
        delta, B, C, bias = self._select(x)
        A, D = diagonal(self.A_log, None), in_float32(self.D)
        return self.out_proj(selective_scan_step(ssm_state, x, delta, A, B, C, D, z, bias, delta_softplus=True))

    def _filter(self) -> tuple[Tensor, Tensor | None]:
        return self.conv1d.weight[:, 0], self.conv1d.bias

    @property
    def _fused_activation(self) -> str | None:
        return "silu" if self.activation in ("silu", "swish") else None

    def _activated(self, x: Tensor) -> Tensor:
        return x if self._fused_activation else self.act(x)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Δ (…, E), B and C (…, N), and what of Δ's bias is left for the scan to add.

        All of it, in fp32, where dt_proj is as transformers made it. An adapter or a quantised layer in its place is
        called whole.
        """
        sizes = (self.time_step_rank, self.ssm_state_size, self.ssm_state_size)
        low_rank, B, C = self._normed(*self.x_proj(x).split(sizes, dim=-1))
        if type(self.dt_proj) not in (nn.Linear, Linear):
            return self.dt_proj(low_rank), B, C, None
        return linear(low_rank, self.dt_proj.weight), B, C, in_float32(self.dt_proj.bias)

    def _normed(self, low_rank: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return low_rank, B, C


class FastFalconMixer(FastMixer):
    """The same for FalconMamba, in which norms stand after x_proj."""

    dt_layernorm: nn.Module
    b_layernorm: nn.Module
    c_layernorm: nn.Module

    def _normed(self, low_rank: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.dt_layernorm(low_rank), self.b_layernorm(B), self.c_layernorm(C)


_PARTS = {
    "FastMambaMixer": (FastMixer, "mamba", "MambaMixer"),
    "FastFalconMambaMixer": (FastFalconMixer, "falcon_mamba", "FalconMambaMixer"),
}


@cache
def fast_mixers() -> dict[type[nn.Module], type[nn.Module]]:
    """Each of transformers' mixers and the class that takes its place: a subclass, so that all else stays as it was.

    Raises:
        MissingPackage: transformers is not installed.
    """
    # Weights that are read without a call of their module have to be there too where accelerate moves them about.
    hooked = require("transformers.integrations.accelerate", "transformers").force_accelerate_hooks
    pairs: dict[type[nn.Module], type[nn.Module]] = {}
    for name, (ours, model, mixer) in _PARTS.items():
        theirs = getattr(require(f"transformers.models.{model}.modeling_{model}", "transformers"), mixer)
        own = {"__module__": __name__, "forward": hooked(["conv1d", "dt_proj"])(ours.forward)}
        pairs[theirs] = type(name, (ours, theirs), own)
    return pairs


def __getattr__(name: str) -> Any:
    """The classes themselves, for pickle: made when first asked for, as transformers need not be installed."""
    for one in fast_mixers().values() if name in _PARTS else ():
        if one.__name__ == name:
            return one
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def _clone(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.clone()


def _with_one_more(state: Tensor | None) -> Tensor | None:
    """The states of all rows and of the padding."""
    return None if state is None else F.pad(state, (0, 0, 0, 0, 0, 1))
