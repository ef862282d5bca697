"""A residual branch's add and the RMSNorm that follows it, as one operator: the maths, and the function people call.

    r' = r + x,   y = weight · r' / sqrt(mean(r'²) + eps).

Backward, with n = r' / sqrt(…) and g = weight · dy, all means over the row:

    d weight = sum over rows of dy · n,   d = (g − n · mean(g · n)) / sqrt(…) + dr',   dx = dr = d.

Nothing is kept but r', which the next layer reads too.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from selective_ssm.ops import checks
from selective_ssm.ops.add_rms_norm import cpu, cuda, reference
from selective_ssm.ops.dispatch import Case, choose
from selective_ssm.ops.registration import call, define, differentiate


class Backend(Protocol):
    """What a module must offer to run the operator; it is handed checked inputs, a row of D after the other."""

    def forward(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Returns y in `dtype`, and the sum in the residual's."""
        ...

    def backward(
        self,
        d_y: Tensor,
        d_total: Tensor | None,
        total: Tensor,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The gradients of residual, x (in `dtype`; None where it is the very same) and weight."""
        ...


_BACKENDS: dict[str, Backend] = {"cuda": cuda, "cpu": cpu, "reference": reference}


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream and normalises the sum, in one pass over memory.

    r' = r + x, rounded to r's dtype; y = weight · r' / sqrt(mean(r'²) + eps), computed in fp32 (float64 for float64).
    Differentiable once in x, residual and weight; the gradients are the same bits each time.

    Args:
        x: (..., D) what the branch adds: fp32, bf16, fp16 or float64.
        residual: (..., D) the stream, in a dtype of its own.
        weight: (D,) the norm's.
        eps: what is added to the mean of squares.
        backend: which implementation runs it; None for the fastest that can (see `ops.dispatch`).

    Returns:
        y (..., D) in weight's dtype, under autocast in autocast's; r' (..., D) in residual's dtype.

    Raises:
        ValueError: a shape or device does not fit, or the backend asked for cannot run here.
        TypeError: a dtype does not fit.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv 1910.07467), equation 4.

    Example:
        >>> y, total = add_rms_norm(torch.tensor([1.0, -4.0]), torch.tensor([2.0, 1.0]), torch.ones(2), eps=0.0)
        >>> y.tolist(), total.tolist()
        ([1.0, -1.0], [3.0, -3.0])
    """
    _check(x, residual, weight)
    dtype = weight.dtype
    if dtype != torch.float64 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    is_differentiated = torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad)
    return call(_FORWARD, is_differentiated, x, residual, weight, eps, dtype, backend)


def _check(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)} for x {tuple(x.shape)}; expected (D,) for (..., D)")
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; expected that of x, {tuple(x.shape)}")
    allowed = (torch.float64,) if x.dtype == torch.float64 else checks.LOW_AND_SINGLE
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight)):
        checks.dtype(name, tensor, allowed)
        checks.device(name, tensor, x.device)


def _choose(residual: Tensor, backend: str | None) -> Backend:
    chosen = choose(Case("add_rms_norm", residual.device.type, residual.dtype, complex_state=False), backend)
    return _BACKENDS[chosen] if residual.numel() > 0 else reference


def _forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, backend: str | None
) -> tuple[Tensor, Tensor]:
    chosen = _choose(residual, backend)
    return chosen.forward(x.contiguous(), residual.contiguous(), weight.contiguous(), eps, dtype)


def _fake_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, backend: str | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), residual.new_empty(x.shape)


def _backward(
    d_y: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = _choose(total, backend)
    d_total = None if d_total is None else d_total.contiguous()
    d_residual, d_x, d_weight = chosen.backward(d_y.contiguous(), d_total, total, weight.contiguous(), eps, dtype)
    return d_residual, total.new_empty(0, dtype=dtype) if d_x is None else d_x, d_weight


def _fake_backward(
    d_y: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_x = total.new_empty(0 if dtype == total.dtype else total.shape, dtype=dtype)
    return total.new_empty(total.shape), d_x, weight.new_empty(weight.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, eps, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)
    ctx.eps, ctx.dtype, ctx.backend, ctx.y_dtype = eps, x.dtype, backend, output[0].dtype


def _differentiate(ctx: Any, d_y: Tensor | None, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    d_y = total.new_zeros(total.shape, dtype=ctx.y_dtype) if d_y is None else d_y
    arguments = (d_y, d_total, total, weight, ctx.eps, ctx.dtype, ctx.backend)
    d_residual, d_x, d_weight = call(_BACKWARD, torch.is_grad_enabled(), *arguments)
    return d_residual if ctx.dtype == total.dtype else d_x, d_residual, d_weight, None, None, None


_FORWARD = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, ScalarType dtype, str? backend)"
    " -> (Tensor y, Tensor total)",
    _forward,
    _fake_forward,
)
_BACKWARD = define(
    "add_rms_norm_backward(Tensor d_y, Tensor? d_total, Tensor total, Tensor weight, float eps, ScalarType dtype,"
    " str? backend) -> (Tensor d_residual, Tensor d_x, Tensor d_weight)",
    _backward,
    _fake_backward,
)
differentiate(_FORWARD, _differentiate, _remember)
differentiate(_BACKWARD, lambda ctx, *_: checks.refuse_twice("add_rms_norm"))
