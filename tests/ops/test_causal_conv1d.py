"""The reference convolution against the float64 definition, forward and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from selective_ssm.ops import causal_conv1d, causal_conv1d_step
from tests.ops import oracle
from tests.ops.cases import gradients
from tests.tolerance import assert_close_to_float64


def arguments(
    batch: int = 2,
    length: int = 37,
    channels: int = 5,
    width: int = 4,
    lengths: tuple[int, ...] = (),
    optional: str = "bi",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = len(lengths) or batch
    if lengths:
        batch, length = 1, sum(lengths)
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    x = normal(batch, length, 2 * channels)[..., channels:]  # a strided view, as of a projection
    tensors = {"x": x, "weight": normal(channels, width)}
    if "b" in optional:
        tensors["bias"] = normal(channels)
    if "i" in optional:
        tensors["initial_state"] = normal(rows, channels, width - 1)
    return {name: x.requires_grad_() for name, x in tensors.items()}, options


def conv_with_state(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return causal_conv1d(**arguments, return_final_state=True, backend="reference")


def assert_case(**case: Any) -> None:
    tensors, options = arguments(**case)

    def run(function: Any, dtype: torch.dtype | None) -> list[torch.Tensor]:
        given = tensors if dtype is None else {name: oracle.cast(x, dtype) for name, x in tensors.items()}
        outputs = function(**given, **options)
        weights = tuple(torch.linspace(-1, 1, x.numel()).view(x.shape).to(tensors["x"].dtype) for x in outputs)
        return [*outputs, *gradients(outputs, given, weights)]

    ours = run(conv_with_state, None)
    plain, exact = run(oracle.conv, torch.float32), run(oracle.conv, torch.float64)
    for name, x, loop, truth in zip(["out", "final state", *tensors], ours, plain, exact, strict=True):
        summed = tensors["x"].numel() if name in {"weight", "bias"} else 0
        assert_close_to_float64(x, loop, truth, multiple=4, summed=summed, name=name)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [(), (5, 0, 1, 2, 12, 0)])
def test_agrees_with_the_definition(activation: str | None, reverse: bool, lengths: tuple[int, ...]) -> None:
    assert_case(activation=activation, reverse=reverse, lengths=lengths)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    assert_case(dtype=dtype, activation="silu")


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    packed=st.booleans(),
    width=st.integers(1, 5),
    reverse=st.booleans(),
    optional=st.sampled_from(["", "b", "i", "bi"]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(lengths: list[int], packed: bool, width: int, reverse: bool, optional: str, seed: int) -> None:
    shape = {"lengths": tuple(lengths)} if packed else {"length": sum(lengths)}
    assert_case(**shape, width=width, reverse=reverse, optional=optional, seed=seed, activation="silu")


def test_agrees_with_torch() -> None:
    tensors, _ = arguments(optional="b", dtype=torch.float64)
    x, weight, bias = tensors.values()
    expected = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=3, groups=5)[..., :-3]
    assert torch.allclose(causal_conv1d(x, weight, bias), expected.transpose(1, 2), rtol=0, atol=1e-13)


def test_gradcheck_in_float64() -> None:
    tensors, options = arguments(lengths=(3, 0, 1, 6), channels=2, dtype=torch.float64, activation="silu")
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *x: conv_with_state(**dict(zip(names, x, strict=True)), **options), tuple(tensors.values())
    )


def test_no_tokens_hand_the_state_through() -> None:
    tensors, _ = arguments(length=0)
    out, final = conv_with_state(**tensors)
    assert out.shape == (2, 0, 5)
    assert torch.equal(final, tensors["initial_state"])


def test_not_a_number_stays_in_its_own_sequence() -> None:
    tensors, options = arguments(lengths=(6, 6), optional="")
    with torch.no_grad():
        tensors["x"][0, 4] = float("nan")
    out, final = conv_with_state(**tensors, **options)
    assert out[0, :4].isfinite().all()
    assert out[0, 4:6].isnan().all()
    assert out[0, 6:].isfinite().all()
    assert final[1].isfinite().all()


@pytest.mark.parametrize("width", [1, 2, 4])
def test_steps_equal_the_convolution(width: int) -> None:
    tensors, _ = arguments(width=width, dtype=torch.float64)
    out, final = conv_with_state(**tensors, activation="silu")
    state = tensors["initial_state"].detach().clone()
    for t in range(tensors["x"].shape[1]):
        now = tensors["x"][:, t], tensors["weight"], tensors["bias"]
        y = causal_conv1d_step(state, *now, activation="silu", backend="reference")
        assert (y - out[:, t]).abs().max() <= 1e-12 * out.abs().max()
    assert torch.equal(state, final)


def test_step_with_slots_and_padding() -> None:
    tensors, _ = arguments(optional="b")
    now = {"x": tensors["x"][:, 0].detach(), "weight": tensors["weight"], "bias": tensors["bias"]}
    now = now | {"backend": "reference"}
    states = torch.randn(4, 5, 3)
    before, one = states.clone(), states[[2]].clone()
    expected = causal_conv1d_step(one, **now | {"x": now["x"][1:]})
    out = causal_conv1d_step(states, **now, state_indices=torch.tensor([-1, 2]))
    assert out[0].eq(0).all()
    assert torch.equal(out[1:], expected)
    assert torch.equal(states[2:3], one)
    assert torch.equal(states[[0, 1, 3]], before[[0, 1, 3]])
