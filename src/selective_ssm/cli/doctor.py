"""``selective-ssm doctor``: versions, devices, what can run here and why not, and how exact it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import rich
import torch
from torch import Tensor

from selective_ssm.bench.cases import OpCase, conv_inputs, scan_inputs
from selective_ssm.bench.report import device_name, machine, table
from selective_ssm.bench.versions import commit, versions
from selective_ssm.ops import causal_conv1d, native, nvrtc, selective_scan
from selective_ssm.ops.dispatch import Case, explain

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selective_ssm.cli.parser import Parser

_OPS = ("selective_scan", "causal_conv1d")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: Parser) -> None:
    """The verb has no arguments of its own."""


def run(options: Namespace) -> None:
    """Print what was found."""
    devices = ", ".join(map(device_name, _devices()))
    facts = {**versions(), "commit": commit(), **machine(), "devices": devices, "CPU library": _native()}
    facts["CUDA kernels"] = nvrtc.explain() or "can be compiled and launched"
    facts |= {name: value for name, value in os.environ.items() if name.startswith("SELECTIVE_SSM_")}
    rows = [{"what": what, "found": "none" if found is None else str(found)} for what, found in facts.items()]
    rich.print(table(rows, title="environment"))
    rich.print(table(list(_abilities()), title="what can run here; error: against the reference in float64"))


def _native() -> str:
    return native.explain() or f"loaded ({native.build()})"


def _devices() -> list[torch.device]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [torch.device("cpu"), *([accelerator] if accelerator else [])]


def _abilities() -> Iterator[dict[str, Any]]:
    """A row for each device, op, dtype and backend: its error, or the reason why it cannot run."""
    for device in _devices():
        for op in _OPS:
            for name, dtype in _DTYPES.items():
                reasons = explain(Case(op=op, device=device.type, dtype=dtype, complex_state=False))
                for backend, reason in reasons.items():
                    found = reason or f"error {_error(op, device, dtype, backend):.1e}"
                    yield {"device": device_name(device), "op": op, "dtype": name, "backend": backend, "found": found}


def _error(op: str, device: torch.device, dtype: torch.dtype, backend: str) -> float:
    """The largest error of the output on a small case, relative to the largest exact value."""
    case = OpCase(batch=2, length=100, channels=32, states=16 if op == "selective_scan" else 3, dtype=dtype)
    inputs = (scan_inputs if op == "selective_scan" else conv_inputs)(case, device)
    exact = _run(op, {name: tensor.cpu().double() for name, tensor in inputs.items()}, "reference")
    found = _run(op, inputs, backend).cpu().double()
    return float((found - exact).abs().max() / exact.abs().max())


def _run(op: str, inputs: dict[str, Any], backend: str) -> Tensor:
    if op == "causal_conv1d":
        return cast(Tensor, causal_conv1d(**inputs, activation="silu", backend=backend))
    return cast(Tensor, selective_scan(**inputs, delta_softplus=True, backend=backend))
