"""The CPU kernel of one token of the selective scan against float64, and a model that learns and writes with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.models.config import LanguageModelConfig
from selective_ssm.models.language import LanguageModel
from selective_ssm.ops import native, selective_scan, selective_scan_step
from selective_ssm.ops.selective_scan import step_cpu
from tests.ops.cases import ScanCase
from tests.ops.launches import poison
from tests.ops.test_selective_scan_step_cuda import CASES, assert_case

OPS = torch.ops.selective_ssm
needs_library = pytest.mark.skipif(native.explain() is not None, reason=str(native.explain()))


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    assert_case(CASES[case], "cpu", step_cpu)


def one_token(case: ScanCase, t: int) -> dict[str, Tensor]:
    """The arguments of a step; those of a sequence at one token."""
    over_time = {"u", "delta", "z"} | ({"B", "C"} - set(case.fixed))
    tensors = {name: x.detach() for name, x in case.arguments()[0].items() if name != "initial_state"}
    return {name: x[:, t] if name in over_time else x for name, x in tensors.items()}


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize(
    "case",
    [
        ScanCase(state=16, channels=70, groups=2),
        ScanCase(state=5, channels=9, discretization="zoh", fixed="C"),
        ScanCase(state=40, channels=9, dtype=torch.bfloat16, fixed="B"),
    ],
    ids=lambda case: f"N = {case.state}",
)
def test_steps_equal_the_scan(case: ScanCase) -> None:
    tensors, options = case.arguments()
    out, final = selective_scan(**tensors, **options, return_final_state=True, backend="cpu")
    state = tensors["initial_state"].detach().clone()
    rest: dict[str, Any] = {"delta_softplus": True, "discretization": case.discretization, "backend": "cpu"}
    for t in range(case.length):
        y = selective_scan_step(state, **one_token(case, t), **rest)
        allowed = 4 * torch.finfo(case.dtype).eps * out[:, t].abs().max()
        assert (y - out[:, t]).abs().max() <= allowed
    assert torch.allclose(state, final, rtol=1e-5, atol=1e-6)


@needs_library
def test_slots_and_padding() -> None:
    case = ScanCase(channels=21, state=5)
    states = torch.randn(5, 21, 5)
    before, two = states.clone(), states[[3, 1]].clone()
    expected = selective_scan_step(two, **one_token(case, 0), backend="cpu")
    out = selective_scan_step(states, **one_token(case, 0), state_indices=torch.tensor([3, 1]), backend="cpu")
    assert torch.equal(out, expected)
    assert torch.equal(states[[3, 1]], two)
    assert torch.equal(states[[0, 2, 4]], before[[0, 2, 4]])

    states = before.clone()
    padded = torch.tensor([-1, 2], dtype=torch.int32)
    out = selective_scan_step(states, **one_token(case, 0), state_indices=padded, backend="cpu")
    assert out[0].eq(0).all()
    assert torch.equal(states[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


@needs_library
def test_slots_that_slip_through_never_leave_the_state() -> None:
    """An unchecked call brings them; every other slot is as it was."""
    state, given = torch.randn(6, 6, 4), one_token(ScanCase(), 0)
    before = state.clone()
    arguments = [given[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    out = OPS.selective_scan_step(state, *arguments, True, False, "euler", torch.tensor([99, -7]), "cpu")
    assert out[0].isfinite().all()
    assert out[1].eq(0).all()
    assert torch.equal(state[:5], before[:5])


@needs_library
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_in_its_row(value: float) -> None:
    case = ScanCase(batch=3, channels=21, state=5)
    given = one_token(case, 0)
    given["delta"] = given["delta"].clone()
    given["delta"][1, 3] = value
    states = torch.randn(3, 21, 5)
    ours, plain = states.clone(), states.clone()
    out = selective_scan_step(ours, **given, delta_softplus=True, backend="cpu")
    expected = selective_scan_step(plain, **given, delta_softplus=True, backend="reference")
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert torch.equal(ours.isfinite(), plain.isfinite())
    assert (~out.isfinite()).sum() == 1


def curve(nudge: float = 0.0, steps: int = 100) -> list[float]:
    """The losses of a small model that learns some sequences by heart; how far a nudge of its weights carries it."""
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(d_model=32, n_layer=2, vocab_size=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + nudge * torch.randn(parameter.shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(32, (4, 40), generator=torch.Generator().manual_seed(1))
    losses: list[float] = []
    for _ in range(steps):
        logits, _ = model(ids[:, :-1])
        loss = F.cross_entropy(logits[..., :32].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@needs_library
def test_a_model_learns_as_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to its curve as another of its own whose weights differ in their last digits."""
    monkeypatch.setenv("SELECTIVE_SSM_BACKEND", "reference")
    plain, nudged = curve(), curve(nudge=1e-7)
    monkeypatch.delenv("SELECTIVE_SSM_BACKEND")
    called: set[str] = set()
    function = native.function
    monkeypatch.setattr(native, "function", lambda name: (called.add(name), function(name))[1])
    ours = curve()
    assert {"selective_scan_forward", "selective_scan_backward"} <= called
    assert plain[-1] < 0.2 * plain[0]
    apart, spread = (max(abs(x - y) for x, y in zip(some, plain, strict=True)) for some in (ours, nudged))
    assert apart <= 4 * spread + 5e-4, f"{apart:.1e} apart, though the reference itself spreads by {spread:.1e}"
