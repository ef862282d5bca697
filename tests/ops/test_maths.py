"""The functions that CPU kernels are written with: how far they are from float64, and what they do at the edges."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch

from selective_ssm.ops import native
from selective_ssm.ops.parameters import Parameters

INF, NAN = float("inf"), float("nan")
SMALLEST = 2.0**-126
FUNCTIONS = ["identity", "exp2", "exp", "sigmoid", "softplus", "hold", "hold_slope"]  # as vector.cpp numbers them


class Apply(Parameters):
    _fields_: ClassVar = [
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("source", ctypes.c_int),
        ("target", ctypes.c_int),
        ("function", ctypes.c_int),
    ]


def apply(name: str, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    numbers = native.NUMBERS[x.dtype], native.NUMBERS[dtype]
    parameters = Apply.of(x.data_ptr(), out.data_ptr(), x.numel(), *numbers, FUNCTIONS.index(name))
    native.function("apply")(ctypes.byref(parameters))
    return out


def softplus(x: torch.Tensor) -> torch.Tensor:
    return x.clamp_min(0) + torch.exp(-x.abs()).log1p()


def hold(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == 0, 1, torch.expm1(x) / x)


def hold_slope(x: torch.Tensor) -> torch.Tensor:
    """By its series near 0, where the rest cancels in float64 too."""
    series = sum((k + 1) / math.factorial(k + 2) * x**k for k in range(20))
    return torch.where(x.abs() < 1, series, (x.exp() * (x - 1) + 1) / x**2)


CASES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float, float]] = {
    "exp2": (torch.exp2, 1, 2),  # exact, and ulps that maths.hpp allows with fma and without
    "exp": (torch.exp, 1, 2),
    "sigmoid": (torch.sigmoid, 3, 3),
    "softplus": (softplus, 3, 3),
    "hold": (hold, 4, 4),
    "hold_slope": (hold_slope, 8, 8),
}


def grid(name: str) -> torch.Tensor:
    """Dense everywhere, denser near 0, with numbers of every exponent."""
    small = torch.logspace(-45, 0, 1000, dtype=torch.float64).float()
    limit = {"exp2": 140, "hold": 88, "hold_slope": 88}.get(name, 110)
    return torch.cat([torch.linspace(-140, limit, 500_001), torch.linspace(-1, 1, 100_001), small, -small])


@pytest.mark.parametrize("name", CASES)
def test_errors_are_bounded(name: str, vectors: str) -> None:
    function, fused, plain = CASES[name]
    x = grid(name)
    exact, found = function(x.double()), apply(name, x).double()
    ulp = torch.exp2(torch.frexp(exact).exponent.double() - 24)
    inside = (exact > SMALLEST) & (exact < torch.finfo(torch.float32).max)
    errors = ((found - exact) / ulp)[inside]
    assert errors.abs().max() <= (plain if vectors == "baseline" else fused)
    near = (x > -0.02) & (x < 0)
    for some in (errors, ((found - exact) / ulp)[near]):
        assert some.mean().abs() < 0.05, "an error that adds up over thousands of tokens"
    assert found[exact < SMALLEST * (1 - 2**-22)].eq(0).all()
    assert found[exact > torch.finfo(torch.float32).max * (1 + 2**-22)].eq(INF).all()


LIMITS = {
    "exp2": {-INF: 0, INF: INF, 0.0: 1, 1.0: 2, -126.0: SMALLEST, 128.0: INF, 1e38: INF, -1e38: 0},
    "exp": {-INF: 0, INF: INF, 0.0: 1, 88.73: INF, -87.4: 0, 1e38: INF, -1e38: 0},
    "sigmoid": {-INF: 0, INF: 1, 0.0: 0.5, 1e38: 1, -1e38: 0},
    "softplus": {-INF: 0, INF: INF, 1e38: 1e38, -1e38: 0},
    "hold": {-INF: 0, 0.0: 1, -1e38: 0},
}


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str) -> None:
    x = torch.tensor(list(LIMITS[name]))
    expected = torch.tensor([float(y) for y in LIMITS[name].values()])
    assert torch.equal(apply(name, x), expected)
    assert torch.equal(apply(name, torch.tensor([-0.0])), apply(name, torch.tensor([0.0])))
    assert apply(name, torch.tensor([NAN, -NAN, 0.0])).isnan().tolist() == [True, True, False]
    payload = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert apply(name, payload).isnan().all()


@pytest.mark.usefixtures("vectors")
def test_brain_floats_are_rounded_as_torch_does() -> None:
    x = torch.arange(-(2**31), 2**31, 8191).to(torch.int32).view(torch.float32)
    x = x[(x.abs() >= SMALLEST) | (x == 0) | x.isnan()]
    found = apply("identity", x, torch.bfloat16)
    assert torch.equal(found.isnan(), x.isnan())
    assert torch.equal(found[~x.isnan()], x.bfloat16()[~x.isnan()])
    back = apply("identity", found)
    assert torch.equal(back[~x.isnan()], found.float()[~x.isnan()])


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 37])
def test_nothing_beside_a_vector_is_written(count: int, dtype: torch.dtype) -> None:
    x = torch.full((count + 32,), NAN, dtype=dtype)
    x[16 : 16 + count] = torch.arange(1, count + 1)
    out = torch.full_like(x, -1)
    numbers = native.NUMBERS[dtype]
    item = x.element_size()
    parameters = Apply.of(x.data_ptr() + 16 * item, out.data_ptr() + 16 * item, count, numbers, numbers, 0)
    native.function("apply")(ctypes.byref(parameters))
    assert torch.equal(out[16 : 16 + count], x[16 : 16 + count])
    assert out[:16].eq(-1).all()
    assert out[16 + count :].eq(-1).all()


def test_subnormals_are_flushed_inside_only(vectors: str) -> None:
    tiny = torch.tensor([1e-40, -1e-40, 3e-38])
    assert apply("identity", tiny).tolist() == tiny.tolist(), "what is only moved stays"
    assert apply("sigmoid", torch.tensor([-87.8])).item() == 0, "7.4e-39, were it not flushed"
    assert (tiny * 0.5 != 0).all(), "the flag was not restored"
    assert math.isclose(tiny[0].item(), 1e-40, rel_tol=1e-4)
