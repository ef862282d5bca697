"""What the selective scan and its step accept; each refusal is one sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from selective_ssm.ops import checks
from selective_ssm.ops.checks import Sizes
from selective_ssm.ops.selective_scan.inputs import Inputs, Options, StepInputs

_DOUBLE = (torch.float64,)
_RATES = (torch.float32, torch.complex64)
_DOUBLE_RATES = (torch.float64, torch.complex128)


def check_scan(inputs: Inputs, discretization: str) -> None:
    """Raises ValueError or TypeError where the arguments of `selective_scan` do not fit together."""
    u, A, cu_seqlens, initial_state = inputs.u, inputs.A, inputs.cu_seqlens, inputs.initial_state
    _check_common(inputs, "BLD", discretization)
    batch, length, _ = u.shape
    if cu_seqlens is not None:
        checks.device("cu_seqlens", cu_seqlens, u.device)
        checks.cu_seqlens(cu_seqlens, batch, length)
    if initial_state is not None:
        first, rows = ("B", batch) if cu_seqlens is None else ("S", cu_seqlens.shape[0] - 1)
        checks.tensor("initial_state", initial_state, (first, "D", "N"), (rows, *A.shape), (A.dtype,), u.device)


def check_step(state: Tensor, inputs: StepInputs, options: Options, state_indices: Tensor | None) -> None:
    """Raises ValueError or TypeError where the arguments of `selective_scan_step` do not fit, but for slots' values."""
    u, A = inputs.u, inputs.A
    _check_common(inputs, "BD", options.discretization)
    first, rows = ("B", u.shape[0]) if state_indices is None else ("slots", checks.sizes_of(state, 3)[0])
    checks.tensor("state", state, (first, "D", "N"), (rows, *A.shape), (A.dtype,), u.device)
    if state_indices is not None:
        checks.tensor("state_indices", state_indices, "B", u.shape[:1], checks.INDEX_DTYPES, u.device)


def _check_common(inputs: Inputs | StepInputs, legend: str, discretization: str) -> None:
    """Checks what a scan and a step share; `legend` is the sequence's."""
    u, delta, A, B, C, D, z, delta_bias, *_ = inputs
    where, sizes = u.device, checks.sizes_of(u, len(legend))
    real, rates = (_DOUBLE, _DOUBLE_RATES) if u.dtype == torch.float64 else (checks.LOW_AND_SINGLE, _RATES)
    checks.tensor("u", u, legend, sizes, real, where)
    checks.channel_last("u", u)
    checks.tensor("delta", delta, legend, sizes, real, where)
    checks.channel_last("delta", delta)
    if z is not None:
        checks.tensor("z", z, legend, sizes, real, where)
        checks.channel_last("z", z)
    channels, states = u.shape[-1], checks.sizes_of(A, 2)[1]
    checks.tensor("A", A, "DN", (channels, states), rates, where)
    if states == 0:
        raise ValueError("A has shape (D, 0); expected at least one state a channel")
    if D is not None:
        checks.tensor("D", D, "D", (channels,), rates[:1], where)
    if delta_bias is not None:
        checks.tensor("delta_bias", delta_bias, "D", (channels,), rates[:1], where)
    kinds = (*real, A.dtype) if A.is_complex() else real
    map_legend, map_sizes = legend[:-1] + "N", (*sizes[:-1], states)
    B_groups = _check_map("B", B, map_legend, map_sizes, channels, kinds, where)
    C_groups = _check_map("C", C, map_legend, map_sizes, channels, kinds, where)
    if B_groups != C_groups and B_groups is not None and C_groups is not None:
        raise ValueError(f"B has {B_groups} groups and C has {C_groups}; expected the same number")
    checks.choice("discretization", discretization, ("euler", "zoh"))


def _check_map(
    name: str,
    x: Tensor,
    legend: str,
    sizes: Sizes,
    channels: int,
    kinds: tuple[torch.dtype, ...],
    where: torch.device,
) -> int | None:
    """B or C: as `legend`, which knows no groups, with G before N, or time-invariant. Returns G, None for the last."""
    axes, groups = x.dim(), 1
    if axes == len(sizes) + 1:
        groups = x.shape[-2]
        checks.tensor(name, x, (*legend[:-1], "G", "N"), (*sizes[:-1], groups, sizes[-1]), kinds, where)
    elif axes == 2 and (axes != len(sizes) or x.shape[0] != sizes[0]):
        groups = None
        if axes == len(sizes) and x.shape[0] != channels:
            raise ValueError(
                f"{name} has {x.shape[0]} rows; expected B = {sizes[0]} of them, or D = {channels} for all time"
            )
        checks.tensor(name, x, "DN", (channels, sizes[-1]), kinds, where)
    else:
        checks.tensor(name, x, legend, sizes, kinds, where)
    checks.channel_last(name, x)
    if groups is not None and (groups == 0 or channels % groups):
        raise ValueError(f"{name} has G = {groups} groups; expected a divisor of D = {channels}")
    return groups
