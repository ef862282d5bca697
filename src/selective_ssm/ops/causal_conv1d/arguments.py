"""What the causal convolution and its step accept; each refusal is one sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from selective_ssm.ops import checks
from selective_ssm.ops.causal_conv1d.inputs import Inputs, Options, StepInputs


def check_conv(inputs: Inputs, activation: str | None) -> None:
    """Raises ValueError or TypeError where the arguments of `causal_conv1d` do not fit together."""
    x, weight, _, initial_state, cu_seqlens = inputs
    kinds = _check_common(inputs, "BLD", activation)
    batch, length, channels = x.shape
    if cu_seqlens is not None:
        checks.device("cu_seqlens", cu_seqlens, x.device)
        checks.cu_seqlens(cu_seqlens, batch, length)
    if initial_state is not None:
        first, rows = ("B", batch) if cu_seqlens is None else ("S", cu_seqlens.shape[0] - 1)
        sizes = (rows, channels, weight.shape[1] - 1)
        checks.tensor("initial_state", initial_state, (first, "D", "H"), sizes, kinds, x.device)


def check_step(state: Tensor, inputs: StepInputs, options: Options, state_indices: Tensor | None) -> None:
    """Raises ValueError or TypeError where the arguments of `causal_conv1d_step` do not fit, but for slots' values."""
    x, weight, _ = inputs
    kinds = _check_common(inputs, "BD", options.activation)
    batch, channels = x.shape
    first, rows = ("B", batch) if state_indices is None else ("slots", checks.sizes_of(state, 3)[0])
    checks.tensor("state", state, (first, "D", "H"), (rows, channels, weight.shape[1] - 1), kinds, x.device)
    if state_indices is not None:
        checks.tensor("state_indices", state_indices, "B", (batch,), checks.INDEX_DTYPES, x.device)


def _check_common(inputs: Inputs | StepInputs, legend: str, activation: str | None) -> tuple[torch.dtype, ...]:
    """Checks what a convolution and a step share; returns the dtypes that are accepted."""
    x, weight, bias, *_ = inputs
    kinds = (torch.float64,) if x.dtype == torch.float64 else checks.LOW_AND_SINGLE
    checks.tensor("x", x, legend, checks.sizes_of(x, len(legend)), kinds, x.device)
    checks.channel_last("x", x)
    channels, (_, width) = x.shape[-1], checks.sizes_of(weight, 2)
    checks.tensor("weight", weight, "DK", (channels, width), kinds, x.device)
    if width == 0:
        raise ValueError("weight has shape (D, 0); expected a filter of at least one tap")
    if bias is not None:
        checks.tensor("bias", bias, "D", (channels,), kinds, x.device)
    checks.choice("activation", activation, (None, "silu"))
    return kinds
