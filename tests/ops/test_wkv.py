"""RWKV's average: against its definition, its kernels against float64, and as one of torch's operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from selective_ssm.ops import nvrtc
from selective_ssm.ops.wkv import cuda, no_average, wkv, wkv_step
from selective_ssm.ops.wkv.inputs import Inputs
from tests.ops import emulator
from tests.ops.guards import Guards
from tests.ops.launches import emulate
from tests.tolerance import assert_close_to_float64

OPS = torch.ops.selective_ssm
PACK = (5, 0, 1, 16, 40, 0, 3, 33, 0)


def by_definition(k: Tensor, v: Tensor, fade: Tensor, bonus: Tensor) -> Tensor:
    """All sums written out, (B, L, D)."""
    ys: list[Tensor] = []
    for t in range(k.shape[1]):
        age = torch.arange(t - 1, -1, -1, dtype=k.dtype)[:, None]
        logits = torch.cat([k[:, :t] - age * fade, k[:, t : t + 1] + bonus], 1)
        ys.append((logits.softmax(1) * v[:, : t + 1]).sum(1))
    return torch.stack(ys, 1)


def by_recurrence(k: Tensor, v: Tensor, fade: Tensor, bonus: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token, in the unit of the largest logit, which is a constant."""
    top, values, weights = state.unbind(1)
    unit, ys = torch.maximum(k.detach().amax(1), top.detach()), list[Tensor]()
    values, weights = (torch.exp(top - unit) * one for one in (values, weights))
    for t in range(k.shape[1]):
        now, own = torch.exp(k[:, t] - unit), torch.exp(k[:, t] + bonus - unit)
        ys.append((values + own * v[:, t]) / (weights + own))
        values, weights = (torch.exp(-fade) * one for one in (values, weights))
        values, weights = values + now * v[:, t], weights + now
    return torch.stack(ys, 1), torch.stack([unit, values, weights], 1)


def drawn(length: int, size: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, v = size * torch.randn(2, length, 5, dtype=dtype), torch.randn(2, length, 5, dtype=dtype)
    return k, v, torch.rand(5, dtype=dtype), torch.randn(5, dtype=dtype)


def some_state(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """What was left by something, or by nothing in the last row."""
    state = torch.randn(rows, 3, width, dtype=dtype)
    state[:, 2] = state[:, 2].exp() + 1
    state[-1:] = no_average(1, width, state.device, dtype)
    return state


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 257])
def test_averages_are_those_of_the_definition(length: int) -> None:
    arguments = drawn(length)
    y, _ = wkv(*arguments, state=no_average(2, 5, arguments[0].device, torch.float64))
    torch.testing.assert_close(y, by_definition(*arguments), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("length", [1, 16, 50])
def test_values_and_gradients_are_those_of_the_recurrence(length: int) -> None:
    leaves = [x.requires_grad_() for x in (*drawn(length), some_state(2, 5, torch.float64))]
    (y, end), (plain, sums) = wkv(*leaves), by_recurrence(*leaves)
    scale = torch.exp(sums[:, 0] - end[:, 0].detach())
    wanted = plain, scale * sums[:, 1], scale * sums[:, 2]
    directions = [torch.randn_like(one) for one in wanted]
    gradients = [torch.autograd.grad(found, leaves, directions) for found in ((y, end[:, 1], end[:, 2]), wanted)]
    for actual, expected in zip((y, *end.unbind(1)[1:], *gradients[0]), (*wanted, *gradients[1]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_of_either_result_alone(used: int) -> None:
    leaves = [x.requires_grad_() for x in (*drawn(20), some_state(2, 5, torch.float64))]
    directions = [torch.randn_like(one) for one in wkv(*leaves)]
    directions[1 - used].zero_()
    wanted = torch.autograd.grad(wkv(*leaves), leaves, directions)
    for gradient, want in zip(torch.autograd.grad(wkv(*leaves)[used], leaves, directions[used]), wanted, strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_no_weight_overflows_or_vanishes(size: float) -> None:
    """e^1000 is not a number of any format, and e^-1000 nothing at all: only their ratios matter."""
    arguments = drawn(80, size, torch.float32)
    expected = by_definition(*(x.double() for x in arguments))
    state = no_average(2, 5, expected.device, torch.float32)
    y, end = wkv(*arguments, state)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-3 * size / 1000)
    k, v, fade, bonus = arguments
    stepped = torch.stack([wkv_step(k[:, t], v[:, t], fade, bonus, state) for t in range(80)], 1)
    torch.testing.assert_close(stepped.double(), expected, rtol=0, atol=2e-3 * size / 1000)
    assert state.isfinite().all()
    assert end.isfinite().all()


def test_without_fading_a_token_counts_as_all_others_do() -> None:
    k, v = torch.zeros(1, 40, 1), torch.arange(40.0)[None, :, None]
    y, _ = wkv(k, v, torch.zeros(1), torch.zeros(1), no_average(1, 1, k.device, k.dtype))
    torch.testing.assert_close(y[0, :, 0], torch.arange(40.0) / 2)


def test_gradients_of_large_logits_are_finite() -> None:
    k, v, fade, bonus = (x.requires_grad_() for x in drawn(50, 500.0, torch.float32))
    y, _ = wkv(k, v, fade, bonus, no_average(2, 5, k.device, k.dtype))
    for gradient in torch.autograd.grad(y.sum(), (k, v, fade, bonus)):
        assert gradient.isfinite().all()


def test_what_is_not_a_number_stays_in_its_sequence() -> None:
    k, v, fade, bonus = (x.requires_grad_() for x in drawn(90))
    k, v, cuts = k[:1], v[:1].clone(), torch.tensor([0, 40, 41, 90])
    v[0, 3] = torch.nan
    y, end = wkv(k, v, fade, bonus, no_average(3, 5, v.device, v.dtype), cuts)
    assert y[0, 39].isnan().all()
    assert y[0, 40:].isfinite().all()
    assert end[1:].isfinite().all()
    (dk,) = torch.autograd.grad(y[0, 40:].sum(), k)
    assert dk[0, 40:].isfinite().all()


def test_a_sequence_without_tokens_hands_its_state_through() -> None:
    state = torch.randn(2, 3, 5, requires_grad=True)
    k, v, fade, bonus = drawn(0, dtype=torch.float32)
    y, end = wkv(k, v, fade, bonus, state)
    assert y.shape == (2, 0, 5)
    assert torch.equal(end, state)
    direction = torch.randn_like(end)
    assert torch.equal(torch.autograd.grad(end, state, direction)[0], direction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    k, v, fade, bonus = drawn(20, dtype=torch.float32)
    tensors = [x.requires_grad_() for x in (k.to(dtype), v.to(dtype), fade, bonus, some_state(2, 5, torch.float32))]
    torch.library.opcheck(OPS.wkv, (*tensors, None, True, None))
    strided = torch.randn(1, 20, 10).to(dtype)[..., ::2]
    packed = (strided, strided, *tensors[2:], torch.tensor([0, 7, 20]), True, None)
    torch.library.opcheck(OPS.wkv, packed)


def test_it_is_not_differentiated_twice() -> None:
    k, *rest = drawn(4)
    state = no_average(2, 5, k.device, k.dtype)
    (gradient,) = torch.autograd.grad(wkv(k.requires_grad_(), *rest, state=state)[0].sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


def test_what_does_not_fit_is_refused() -> None:
    k, v, fade, bonus = drawn(4, dtype=torch.float32)
    state = no_average(2, 5, k.device, k.dtype)
    with pytest.raises(TypeError, match="v has dtype bfloat16; expected float32"):
        wkv(k, v.bfloat16(), fade, bonus, state)
    with pytest.raises(ValueError, match=r"bonus has shape \(4,\); expected \(D\) with D = 5"):
        wkv(k, v, fade, bonus[:4], state)
    with pytest.raises(ValueError, match=r"state has shape \(2, 5\); expected \(B, 3, D\)"):
        wkv(k, v, fade, bonus, state[:, 0])
    with pytest.raises(ValueError, match="the batch is 2; expected 1 with cu_seqlens"):
        wkv(k, v, fade, bonus, state, torch.tensor([0, 4]))


KERNEL_CASES: dict[str, dict[str, Any]] = {
    "one token": {"length": 1},
    "a stretch": {"length": 16, "width": 32},
    "many stretches": {"length": 75},
    "weights of e^500": {"length": 40, "size": 500.0},
    "weights that hardly fade": {"length": 300, "width": 5, "fade": 1e-3},
    "weights that hardly last": {"length": 50, "fade": 30.0},
    "a pack": {"length": sum(PACK), "lengths": PACK},
    "bfloat16": {"length": 75, "dtype": torch.bfloat16},
    "bfloat16, a pack": {"length": sum(PACK), "lengths": PACK, "dtype": torch.bfloat16},
    "float16": {"length": 33, "dtype": torch.float16},
}
NAMES = ("y", "end", "k", "v", "fade", "bonus", "state")


def arguments_of(
    length: int,
    width: int = 37,
    size: float = 1.0,
    fade: float = 1.0,
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, ...] | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """What is differentiated, and where sequences begin."""
    rows = 1 if lengths else 2
    k, v = (size * torch.randn(rows, length, width)).to(dtype), torch.randn(rows, length, width).to(dtype)
    state = some_state(len(lengths) if lengths else rows, width, torch.float32)
    offsets = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    return [k, v, fade * torch.rand(width), torch.randn(width), state], offsets


def results(
    tensors: list[Tensor], offsets: Tensor | None, directions: tuple[Tensor, Tensor], backend: str
) -> list[Tensor]:
    """The outputs and every gradient, on the CPU."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = wkv(*leaves, cu_seqlens=offsets, backend=backend)
    given = [x.to(like.device, like.dtype) for x, like in zip(directions, outputs, strict=True)]
    return [x.detach().cpu() for x in (*outputs, *torch.autograd.grad(outputs, leaves, given))]


def hold_against_float64(case: dict[str, Any], device: str = "cpu") -> list[Tensor]:
    tensors, offsets = arguments_of(**case)
    directions = torch.randn(tensors[0].shape).to(tensors[0].dtype), torch.randn(tensors[-1].shape)
    moved, places = [x.to(device) for x in tensors], None if offsets is None else offsets.to(device)
    found = results(moved, places, directions, "cuda")
    plain = results(tensors, offsets, directions, "reference")
    exact = results([x.double() for x in tensors], offsets, directions, "reference")
    for name, actual, expected, truth in zip(NAMES, found, plain, exact, strict=True):
        assert actual.dtype == expected.dtype
        assert_close_to_float64(
            *(of_tops_apart(one, name) for one in (actual, expected, truth)),
            summed=tensors[0][..., 0].numel() if name in {"fade", "bonus"} else 0,
            name=name,
        )
    return found


def of_tops_apart(x: Tensor, name: str) -> Tensor:
    """An end state without what stands for the logarithm of nothing."""
    return x.clamp_min(-1e4) if name == "end" else x


@pytest.mark.skipif(emulator.explain() is not None, reason=str(emulator.explain()))
@pytest.mark.parametrize("case", KERNEL_CASES.values(), ids=KERNEL_CASES)
def test_the_kernels_thread_by_thread(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, cuda)
    hold_against_float64(case)


@pytest.mark.skipif(emulator.explain() is not None, reason=str(emulator.explain()))
@pytest.mark.parametrize("offsets", [[0, 90, 20], [-5, 3, 40], [40, 10, 0]])
def test_whatever_offsets_hold_nothing_else_is_touched(offsets: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, cuda)
    tensors, _ = arguments_of(length=40, width=5, lengths=(20, 20))
    places = emulator.fenced(torch.tensor(offsets, dtype=torch.int32))
    inputs, guards = Inputs(*[emulator.fenced(x) for x in tensors], cu_seqlens=places), Guards()
    with guards.allocating():
        _, end, kept = cuda.forward(inputs, True)
        assert kept is not None
        cuda.backward(emulator.fenced(tensors[0]), end, kept, inputs)
    assert guards.intact()


@pytest.mark.skipif(nvrtc.explain() is not None, reason=str(nvrtc.explain()))
@pytest.mark.parametrize(
    "case",
    [*KERNEL_CASES.values(), {"length": 2048, "width": 100, "fade": 0.1}, {"length": 1, "width": 1}],
    ids=[*KERNEL_CASES, "long", "one number"],
)
def test_the_kernels(case: dict[str, Any]) -> None:
    hold_against_float64(case, "cuda")


@pytest.mark.skipif(nvrtc.explain() is not None, reason=str(nvrtc.explain()))
def test_a_captured_step_of_training_is_the_same_bits() -> None:
    tensors, offsets = arguments_of(length=200, width=64, lengths=(120, 80))
    leaves = [x.cuda().requires_grad_() for x in tensors]
    assert offsets is not None
    places = offsets.cuda()

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(wkv(*leaves, cu_seqlens=places)[0].square().sum(), leaves)

    wanted = gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients()
    for _ in range(3):
        for one in found:
            one.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
