"""What the causal convolution and its step accept; each refusal is one sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from selective_ssm.ops import checks
from selective_ssm.ops.causal_conv1d.inputs import Inputs, StepInputs


def check_conv(inputs: Inputs, activation: str | None) -> None:
    """Raises ValueError or TypeError where the arguments of `causal_conv1d` do not fit together."""
    x, cu_seqlens = inputs.x, inputs.cu_seqlens
    sizes = _check_common(inputs, "B L D", activation)
    if cu_seqlens is not None:
        checks.device("cu_seqlens", cu_seqlens, x.device)
        checks.cu_seqlens(cu_seqlens, sizes["B"], sizes["L"])
        sizes["S"] = cu_seqlens.shape[0] - 1
    if inputs.initial_state is not None:
        legend = "B D H" if cu_seqlens is None else "S D H"
        _check_tensor("initial_state", inputs.initial_state, legend, sizes | {"H": sizes["K"] - 1}, x)


def check_step(state: Tensor, inputs: StepInputs, state_indices: Tensor | None, activation: str | None) -> None:
    """Raises ValueError or TypeError where the arguments of `causal_conv1d_step` do not fit together."""
    sizes = _check_common(inputs, "B D", activation)
    sizes["H"] = sizes["K"] - 1
    _check_tensor("state", state, "B D H" if state_indices is None else "slots D H", sizes, inputs.x)
    if state_indices is not None:
        checks.device("state_indices", state_indices, inputs.x.device)
        checks.state_indices(state_indices, sizes["B"], sizes["slots"])


def _check_common(inputs: Inputs | StepInputs, sequence: str, activation: str | None) -> dict[str, int]:
    """Checks what a convolution and a step share, and returns the sizes found."""
    sizes: dict[str, int] = {}
    _check_tensor("x", inputs.x, sequence, sizes, inputs.x)
    checks.channel_last("x", inputs.x)
    _check_tensor("weight", inputs.weight, "D K", sizes, inputs.x)
    if sizes["K"] == 0:
        raise ValueError("weight has shape (D, 0); expected a filter of at least one tap")
    if inputs.bias is not None:
        _check_tensor("bias", inputs.bias, "D", sizes, inputs.x)
    checks.choice("activation", activation, (None, "silu"))
    return sizes


def _check_tensor(name: str, tensor: Tensor, legend: str, sizes: dict[str, int], x: Tensor) -> None:
    checks.shape(name, tensor, legend, sizes)
    wide = x.dtype == torch.float64
    checks.dtype(name, tensor, (torch.float64,) if wide else checks.LOW_AND_SINGLE)
    checks.device(name, tensor, x.device)
