"""The stack of residual branches: norm, mixer, add; an add and the next norm are one operator.

Legend: B batch, L length, D width of the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from selective_ssm.layers import Mixer, MixerConfig, State, build_mixer
from selective_ssm.layers.norm import build_norm
from selective_ssm.layers.recompute import Recompute, recomputing
from selective_ssm.models.config import LanguageModelConfig

_LONG = 1 << 20  # tokens; a state that grows with them is larger with room for so many


class Layer(nn.Module):
    """One residual branch: mixer(norm(x)) of the residual stream x, to be added to it.

    The stream comes beside what the branch before will add to it, since that add and this norm are one pass over
    memory; and it leaves beside what this branch will add.
    """

    def __init__(self, config: LanguageModelConfig, mixer: MixerConfig) -> None:
        super().__init__()
        self.norm = build_norm(config.norm, config.d_model, config.norm_eps)
        self.mixer: Mixer = build_mixer(mixer, config.d_model)

    def forward(
        self, x: Tensor, before: Tensor, state: State | None, *, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor, State | None]:
        normed, x = self.norm.add(x, before)
        branch, state = self.mixer(normed, state, cu_seqlens=cu_seqlens, return_state=return_state)
        return x, branch, state

    def step(
        self, x: Tensor, before: Tensor, state: State, *, state_indices: Tensor | None
    ) -> tuple[Tensor, Tensor, State]:
        normed, x = self.norm.add(x, before)
        branch, state = self.mixer.step(normed, state, state_indices=state_indices)
        return x, branch, state


class Backbone(nn.Module):
    """The n_layer residual branches of a model, and the norm after them.

    The residual stream is fp32 where `LanguageModelConfig.residual_in_fp32` asks for it; the norms hand it to the
    mixers in the dtype of the weights. `recompute` says what of each branch runs again for the backward pass.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.recompute: Recompute = "none"
        layers = nn.ModuleList(Layer(config, mixer) for mixer in config.layers)
        self.layers = cast("Sequence[Layer]", layers)
        self.norm_f = build_norm(config.norm, config.d_model, config.norm_eps)
        self._scale_by_depth()

    def reset_parameters(self) -> None:
        """Draw every parameter anew; what writes to the residual stream is divided by sqrt(n_layer), as in GPT-2."""
        for layer in self.layers:
            layer.norm.reset_parameters()
            layer.mixer.reset_parameters()
        self.norm_f.reset_parameters()
        self._scale_by_depth()

    @torch.no_grad()
    def _scale_by_depth(self) -> None:
        for layer in self.layers:
            layer.mixer.out_proj.weight /= math.sqrt(len(self.layers))

    @property
    def state_grows(self) -> bool:
        """Whether a state takes more memory for longer texts."""
        nowhere = torch.device("meta")

        def nbytes(length: int) -> int:
            states = (layer.mixer.init_state(1, nowhere, torch.float32, length) for layer in self.layers)
            return sum(tensor.nbytes for state in states for tensor in state)

        return nbytes(1) != nbytes(_LONG)

    def _begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream before x, and x as what is to be added to it: the first add is then as all the others."""
        dtype = torch.promote_types(x.dtype, torch.float32) if self.residual_in_fp32 else x.dtype
        return torch.zeros_like(x, dtype=dtype), x

    def forward(
        self,
        x: Tensor,
        states: Sequence[State] | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, list[State]]:
        """Pass x (B, L, D) through every branch, each going on from its state; the end states too where asked for."""
        x, branch = self._begin(x)
        ends: list[State] = []
        for index, layer in enumerate(self.layers):
            state = None if states is None else states[index]
            options = {"cu_seqlens": cu_seqlens, "return_state": return_state}
            x, branch, state = recomputing(layer, self.recompute, x, branch, state, **options)
            if return_state:
                ends.append(state)
        return self.norm_f.add(x, branch)[0], ends

    def step(self, x: Tensor, states: Sequence[State], *, state_indices: Tensor | None = None) -> Tensor:
        """Pass one token a row, x (B, D), through every branch; the states are updated in place."""
        x, branch = self._begin(x)
        for layer, state in zip(self.layers, states, strict=True):
            x, branch, after = layer.step(x, branch, state, state_indices=state_indices)
            for old, new in zip(state, after, strict=True):
                if new is not old:
                    old.copy_(new)
        return self.norm_f.add(x, branch)[0]
