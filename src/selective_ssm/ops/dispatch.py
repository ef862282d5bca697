"""The one place that asks "what can run here?".

>>> import torch
>>> case = Case(op="selective_scan", device="cpu", dtype=torch.float64, complex_state=False)
>>> choose(case)
'reference'
>>> explain(case)["reference"] is None
True
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from selective_ssm.errors import UserError, nearest
from selective_ssm.ops import native, nvrtc

CPU_KERNELS = frozenset({"add_rms_norm", "causal_conv1d", "linear", "selective_scan"})
"""The operators that the backend "cpu" has."""


class Case(NamedTuple):
    """What a backend must know of a call to say whether it can serve it."""

    op: str
    device: str  # a torch device type: "cpu", "cuda", ...
    dtype: torch.dtype  # of the sequence
    complex_state: bool


def _cuda(case: Case) -> str | None:
    if case.device != "cuda":
        return "it takes tensors on a CUDA device"
    if case.complex_state:
        return "it takes no complex state"
    if case.dtype == torch.float64:
        return "it computes in float32, not in float64"
    return nvrtc.explain()


def _cpu(case: Case) -> str | None:
    if case.op.removesuffix("_step") not in CPU_KERNELS:
        return f"it has no kernel for {case.op}"
    if case.device != "cpu":
        return "it takes tensors on a CPU"
    if case.complex_state:
        return "it takes no complex state"
    if case.dtype not in native.NUMBERS:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in native.NUMBERS)
        return f"it takes {names}, not {str(case.dtype).removeprefix('torch.')}"
    return native.explain()


def _reference(case: Case) -> str | None:
    return None


# Fastest first. Each says why it cannot run a case, or None where it can.
BACKENDS: Mapping[str, Callable[[Case], str | None]] = {"cuda": _cuda, "cpu": _cpu, "reference": _reference}


def explain(case: Case) -> dict[str, str | None]:
    """For each backend, fastest first, the reason why it cannot run this case, or None where it can."""
    return {name: reason(case) for name, reason in BACKENDS.items()}


def choose(case: Case, backend: str | None = None, environment: Mapping[str, str] = os.environ) -> str:
    """The backend that serves a case: the one asked for, else the one SELECTIVE_SSM_BACKEND names, else the fastest.

    Raises:
        UserError: the backend asked for does not exist, or cannot run this case; the reason is in the message. Another
            is never taken in its place.
    """
    backend = backend or environment.get("SELECTIVE_SSM_BACKEND") or None
    if backend is None:
        return next(name for name, reason in BACKENDS.items() if reason(case) is None)
    reasons = explain(case)
    if backend not in reasons:
        hint = nearest(backend, reasons)
        raise UserError(f"backend {backend!r} does not exist{hint}; expected one of {', '.join(map(repr, reasons))}")
    if reasons[backend] is not None:
        raise UserError(f"backend {backend!r} cannot run {case.op} here: {reasons[backend]}")
    return backend
