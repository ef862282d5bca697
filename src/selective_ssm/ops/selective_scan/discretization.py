"""From continuous to discrete time: the factors by which a step of length dt moves the state.

With x = dt A, the state decays by exp(x) and the input enters by dt B (Euler) or by dt B (exp(x) - 1) / x (zero-order
hold): Gu & Dao 2023, equation 4.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_SERIES_RADIUS = 0.5
_SERIES_TERMS = 16  # the first term left out is below 1e-17 inside the radius


def decay(exponent: Tensor) -> Tensor:
    """exp(x), overwriting a real x; zero where it is below the square root of the smallest normal number.

    What is dropped (1e-19 in fp32) is lost in rounding wherever it is added to anything. What is kept gives a normal
    number in its product with any ordinary state: subnormal ones cost a processor up to a hundred times the cycles.
    """
    smallest = math.sqrt(torch.finfo(exponent.dtype).tiny)
    if exponent.is_complex():
        return torch.polar(F.threshold(exponent.real.exp(), smallest, 0.0), exponent.imag)
    return F.threshold(exponent.exp_(), smallest, 0.0, inplace=True)


def exprel(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x, exact to rounding as x -> 0, where it is 1; a complex x that is subnormal divides nothing."""
    one = torch.ones_like(x)
    is_nothing = x.abs() < torch.finfo(x.dtype).tiny
    return torch.where(is_nothing, one, torch.expm1(x) / torch.where(is_nothing, one, x))


def exprel_derivative(x: Tensor) -> Tensor:
    """d/dx (exp(x) - 1) / x = (exp(x) - exprel(x)) / x, by its series sum_k (k + 1) / (k + 2)! x^k near 0."""
    near = x.abs() < _SERIES_RADIUS
    small = torch.where(near, x, torch.zeros_like(x))
    series = torch.zeros_like(x)
    for k in reversed(range(_SERIES_TERMS)):
        series = series * small + (k + 1) / math.factorial(k + 2)
    return torch.where(near, series, (torch.exp(x) - exprel(x)) / torch.where(near, torch.ones_like(x), x))
