"""What the selective scan and its step accept; each refusal is one sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from selective_ssm.ops import checks
from selective_ssm.ops.selective_scan.inputs import Inputs, StepInputs


def check_scan(inputs: Inputs, discretization: str) -> None:
    """Raises ValueError or TypeError where the arguments of `selective_scan` do not fit together."""
    u, A, cu_seqlens, initial_state = inputs.u, inputs.A, inputs.cu_seqlens, inputs.initial_state
    sizes = _check_common(inputs, "B L D", "B L G N", discretization)
    if cu_seqlens is not None:
        checks.device("cu_seqlens", cu_seqlens, u.device)
        checks.cu_seqlens(cu_seqlens, sizes["B"], sizes["L"])
        sizes["S"] = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        checks.shape("initial_state", initial_state, "B D N" if cu_seqlens is None else "S D N", sizes)
        checks.dtype("initial_state", initial_state, (A.dtype,))
        checks.device("initial_state", initial_state, u.device)


def check_step(state: Tensor, inputs: StepInputs, state_indices: Tensor | None, discretization: str) -> None:
    """Raises ValueError or TypeError where the arguments of `selective_scan_step` do not fit together."""
    u = inputs.u
    sizes = _check_common(inputs, "B D", "B G N", discretization)
    checks.shape("state", state, "B D N" if state_indices is None else "slots D N", sizes)
    checks.dtype("state", state, (inputs.A.dtype,))
    checks.device("state", state, u.device)
    if state_indices is not None:
        checks.device("state_indices", state_indices, u.device)
        checks.state_indices(state_indices, sizes["B"], sizes["slots"])


def _check_common(inputs: Inputs | StepInputs, sequence: str, projection: str, discretization: str) -> dict[str, int]:
    """Checks what a scan and a step share, and returns the sizes found."""
    u, A = inputs.u, inputs.A
    real = (torch.float64,) if u.dtype == torch.float64 else checks.LOW_AND_SINGLE
    rates = (torch.float64, torch.complex128) if u.dtype == torch.float64 else (torch.float32, torch.complex64)
    sizes: dict[str, int] = {}
    for name, x in (("u", u), ("delta", inputs.delta), ("z", inputs.z)):
        if x is not None:
            _check_tensor(name, x, sequence, sizes, real, u)
            checks.channel_last(name, x)
    _check_tensor("A", A, "D N", sizes, rates, u)
    if sizes["N"] == 0:
        raise ValueError("A has shape (D, 0); expected at least one state a channel")
    for name, x in (("D", inputs.D), ("delta_bias", inputs.delta_bias)):
        if x is not None:
            _check_tensor(name, x, "D", sizes, rates[:1], u)
    groups = [
        _check_projection(name, x, projection, sizes, (*real, A.dtype) if A.is_complex() else real, u)
        for name, x in (("B", inputs.B), ("C", inputs.C))
    ]
    if None not in groups and groups[0] != groups[1]:
        raise ValueError(f"B has {groups[0]} groups and C has {groups[1]}; expected the same number")
    checks.choice("discretization", discretization, ("euler", "zoh"))
    return sizes


def _check_tensor(
    name: str, x: Tensor, legend: str, sizes: dict[str, int], dtypes: tuple[torch.dtype, ...], u: Tensor
) -> None:
    checks.shape(name, x, legend, sizes)
    checks.dtype(name, x, dtypes)
    checks.device(name, x, u.device)


def _check_projection(
    name: str, x: Tensor, legend: str, sizes: dict[str, int], dtypes: tuple[torch.dtype, ...], u: Tensor
) -> int | None:
    """B or C: over time as `legend`, with or without G, or a time-invariant (D, N). Returns G, None for the last."""
    time_invariant = x.dim() == 2 and (legend != "B G N" or x.shape[0] != sizes["B"])
    if time_invariant and legend == "B G N" and x.shape[0] != sizes["D"]:
        raise ValueError(
            f"{name} has {x.shape[0]} rows; expected B = {sizes['B']} of them, or D = {sizes['D']} for all time"
        )
    grouped = x.dim() == len(legend.split())
    legend = "D N" if time_invariant else legend if grouped else legend.replace(" G", "")
    _check_tensor(name, x, legend, dict(sizes), dtypes, u)
    checks.channel_last(name, x)
    if time_invariant:
        return None
    groups = x.shape[-2] if grouped else 1
    if groups == 0 or sizes["D"] % groups:
        raise ValueError(f"{name} has G = {groups} groups; expected a divisor of D = {sizes['D']}")
    return groups
