"""The one rule by which results are compared with float64: a small multiple of the reference's own error."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def allowed_error(
    dtype: torch.dtype, reference_error: float, largest: float, *, summed: int = 0, multiple: float = 2.0
) -> float:
    """multiple * max|reference - exact| + 8 eps max|exact| (+ sqrt(summed) eps32 max|exact|), given the two maxima.

    `dtype` is that of the result, eps half an ulp of it; `summed` is the number of terms that a gradient sums over.
    """
    shares = 8 * torch.finfo(dtype).eps / 2 + math.sqrt(summed) * torch.finfo(torch.float32).eps / 2
    return multiple * reference_error + shares * largest


def assert_close_to_float64(
    actual: Tensor, reference: Tensor, exact: Tensor, *, summed: int = 0, multiple: float = 2.0, name: str = "result"
) -> None:
    """max|actual - exact| is at most `allowed_error`.

    `reference` is the trusted implementation in the same dtype, `exact` the float64 truth.
    """
    wide = torch.complex128 if exact.is_complex() else torch.float64
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{name}: not finite"
    if exact.numel() == 0:
        return
    largest = exact.abs().max().item()
    error = (actual.to(wide) - exact).abs().max().item()
    plain = (reference.to(wide) - exact).abs().max().item()
    allowed = allowed_error(actual.dtype, plain, largest, summed=summed, multiple=multiple)
    assert error <= allowed, f"{name}: error {error:.3e} against float64, allowed {allowed:.3e}, largest {largest:.3e}"
