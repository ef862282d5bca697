"""The convolution's CPU kernels against float64, with each instruction set; threads: test_parallel.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selective_ssm.ops import causal_conv1d, causal_conv1d_step, native
from tests.ops import oracle
from tests.ops.guards import Guards
from tests.ops.launches import poison
from tests.ops.test_causal_conv1d import arguments
from tests.ops.test_causal_conv1d_cuda import CASES, PACK, STEPS, assert_case, assert_steps, mixed, results, step_case

OPS = torch.ops.selective_ssm
needs_library = pytest.mark.skipif(native.explain() is not None, reason=str(native.explain()))
LONG_PACK = (0, 300, 1, 0, 2, 700, 63, 0)


def case_of(**case: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """As `arguments`, of a dtype that is served."""
    if case.get("dtype") == torch.float16:
        case["dtype"] = torch.bfloat16
    return arguments(**case)


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    assert_case(*case_of(**CASES[case]), "cpu", "cpu")


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        {"length": 1},
        {"length": 2},
        {"length": 63},
        {"length": 1000},
        {"length": 1000, "reverse": True},
        {"lengths": LONG_PACK},
        {"lengths": LONG_PACK, "reverse": True},
    ],
)
def test_lengths_beyond_a_task(case: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    assert_case(*case_of(channels=21, activation="silu", dtype=dtype, **case), "cpu", "cpu")


@needs_library
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 40])
def test_widths(width: int) -> None:
    assert_case(*case_of(channels=40, width=width, lengths=PACK, reverse=width % 2 == 0), "cpu", "cpu")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any),
    packed=st.booleans(),
    width=st.integers(1, 6),
    channels=st.integers(1, 40),
    reverse=st.booleans(),
    optional=st.sampled_from(["", "b", "i", "bi"]),
    seed=st.integers(0, 2**16),
)
@needs_library
def test_any_shape(lengths: list[int], packed: bool, seed: int, **case: Any) -> None:
    shape = {"lengths": tuple(lengths)} if packed else {"length": sum(lengths)}
    assert_case(*case_of(**shape, **case, seed=seed, activation="silu"), "cpu", "cpu")


@needs_library
def test_dtypes_and_layouts() -> None:
    assert_case(*mixed(), "cpu", "cpu")


@needs_library
@pytest.mark.parametrize("layout", ["expanded", "length inside", "state outside"])
def test_gradients_of_any_layout(layout: str) -> None:
    tensors, options = arguments(length=63, channels=8, activation="silu")
    d_out = {
        "expanded": torch.randn(1, 1, 8).expand(2, 63, 8),
        "length inside": torch.randn(2, 8, 63).transpose(1, 2),
        "state outside": torch.randn(2, 63, 16)[..., ::2],
    }[layout]
    d_final = torch.randn(3, 2, 8).permute(1, 2, 0)

    def gradient(backend: str) -> tuple[torch.Tensor, ...]:
        outputs = causal_conv1d(**tensors, **options, return_final_state=True, backend=backend)
        return torch.autograd.grad(outputs, list(tensors.values()), (d_out, d_final))

    for x, y in zip(gradient("cpu"), gradient("reference"), strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(), PACK])
def test_nothing_beside_a_tensor_is_touched(dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    tensors, options = arguments(channels=21, lengths=lengths, activation="silu", dtype=dtype)
    expected = results(causal_conv1d, tensors, options, "cpu", return_final_state=True, backend="cpu")
    guards = Guards()
    guarded = {name: guards.copy(x.detach(), "cpu").requires_grad_() for name, x in tensors.items()}
    with guards.allocating():
        outputs = causal_conv1d(**guarded, **options, return_final_state=True, backend="cpu")
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator).to(dtype) for x in outputs]
        found = [*outputs, *torch.autograd.grad(outputs, list(guarded.values()), weights)]
    assert guards.intact()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_not_a_number_stays_in_its_own_sequence(value: float, reverse: bool) -> None:
    lengths = (20, 0, 33, 300, 5)
    tensors, options = arguments(lengths=lengths, channels=21, optional="i", activation="silu", reverse=reverse)
    clean = results(causal_conv1d, tensors, options, "cpu", return_final_state=True, backend="cpu")
    with torch.no_grad():
        tensors["x"][0, 25], tensors["x"][0, 60] = value, value
    dirty = results(causal_conv1d, tensors, options, "cpu", return_final_state=True, backend="cpu")
    plain = results(causal_conv1d, tensors, options, "cpu", return_final_state=True, backend="reference")
    for x, reference in zip(dirty, plain, strict=True):
        assert torch.equal(x.isnan(), reference.isnan())
        assert torch.equal(x.isposinf(), reference.isposinf())
        assert torch.equal(x.isneginf(), reference.isneginf())
    for k in (0, 2):  # out and the gradient of x
        assert torch.equal(dirty[k][:, :20], clean[k][:, :20])
        assert torch.equal(dirty[k][:, 353:], clean[k][:, 353:])
    for k in (1, 4):  # final state and the gradient of the initial one
        assert torch.equal(dirty[k][[0, 1, 4]], clean[k][[0, 1, 4]])


@needs_library
@pytest.mark.parametrize("reverse", [False, True])
def test_offsets_that_slip_through_never_leave_the_row(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every token gets a value."""
    poison(monkeypatch)
    tensors, _ = arguments(lengths=(20, 17), channels=8, optional="b")
    for offsets in ([5, 1000, -3], [37, 0, 37], [-9, -9, -9], [30, 20, 10]):
        bad = torch.tensor(offsets, dtype=torch.int32)
        out, final, _ = OPS.causal_conv1d(*tensors.values(), None, bad, "silu", reverse, True, False, "cpu")
        assert out.isfinite().all()
        assert final.isfinite().all()


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize(("dtype", "width", "slots"), [step for step in STEPS if step[0] != torch.float16])
def test_steps(dtype: torch.dtype, width: int, slots: list[int] | None) -> None:
    assert_steps(dtype, width, slots, "cpu", "cpu")


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_equal_the_convolution(state_dtype: torch.dtype) -> None:
    tensors, _ = arguments(length=20, channels=37, dtype=torch.bfloat16)
    tensors = {name: x.detach() for name, x in tensors.items()}
    expected, final = causal_conv1d(**tensors, activation="silu", return_final_state=True, backend="reference")
    state = tensors.pop("initial_state").to(state_dtype)
    x = tensors.pop("x")
    for t in range(20):
        y = causal_conv1d_step(state, x[:, t], **tensors, activation="silu", backend="cpu")
        assert torch.allclose(y, expected[:, t], rtol=2**-7, atol=1e-5)
    assert torch.equal(state, final.to(state_dtype))


@needs_library
def test_slots_that_slip_through_never_leave_the_state() -> None:
    state, given = step_case(torch.float32, 4)
    before = state.clone()
    rest = (None, "silu", False, torch.tensor([99, -1, -2, -3]), "cpu")
    out = OPS.causal_conv1d_step(state, given["x"], given["weight"], *rest)
    assert out[0].isfinite().all()
    assert out[1:].eq(0).all()
    assert torch.equal(state[:5], before[:5])


@needs_library
def test_the_operator_is_well_formed() -> None:
    tensors, _ = arguments(channels=6)
    inputs = (*tensors.values(), None, "silu", False, True, True, "cpu")
    torch.library.opcheck(OPS.causal_conv1d, inputs)
    step = (torch.randn(2, 6, 3), torch.randn(2, 6), torch.randn(6, 4), None, "silu", False, None, "cpu")
    torch.library.opcheck(OPS.causal_conv1d_step, step)


def test_without_the_library_the_reference_serves(library_is: Callable[[Path | None], None]) -> None:
    library_is(None)
    tensors, options = arguments(channels=6, activation="silu")
    expected = causal_conv1d(**tensors, **options, backend="reference")
    assert torch.equal(causal_conv1d(**tensors, **options), expected)
    with pytest.raises(ValueError, match="'cpu' cannot run causal_conv1d here: the CPU library was not built"):
        causal_conv1d(**tensors, **options, backend="cpu")


@needs_library
def test_the_library_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SELECTIVE_SSM_BACKEND", raising=False)
    tensors, options = arguments(channels=6, activation="silu")
    called: list[str] = []
    function = native.function
    monkeypatch.setattr(native, "function", lambda name: (called.append(name), function(name))[1])
    causal_conv1d(**tensors, **options).sum().backward()
    assert called == ["causal_conv1d", "causal_conv1d_backward"]
    causal_conv1d(**{name: oracle.cast(x, torch.float64) for name, x in tensors.items()}, **options)
    assert len(called) == 2
