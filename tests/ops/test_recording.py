"""What may be recorded, and what a recording does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from selective_ssm.ops import causal_conv1d_step, linear, native
from selective_ssm.ops.recording import record

pytestmark = pytest.mark.skipif(native.explain() is not None, reason=str(native.explain()))


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.no_grad():
        yield


def test_a_recording_does_what_the_function_did_to_what_lies_there_now() -> None:
    x, weight, log = torch.randn(2, 20), torch.randn(40, 20), torch.randn(20, 4)
    state = torch.randn(2, 20, 3)

    def function() -> Tensor:
        half = linear(x, weight).chunk(2, dim=-1)[1]
        return causal_conv1d_step(state, half, log.exp(), activation="silu")

    copy, inputs = state.clone(), (x.clone(), torch.randn(2, 20))
    result, recording = record(function, [x, state])
    expected = [causal_conv1d_step(copy, linear(one, weight)[:, 20:], log.exp(), activation="silu") for one in inputs]
    assert result.equal(expected[0])
    assert recording is not None
    x.copy_(inputs[1])
    assert recording.run().equal(expected[1])
    assert state.equal(copy)


X, WEIGHT = torch.randn(2, 20), torch.randn(20, 20)
REFUSED: dict[str, Callable[[], Tensor]] = {
    "torch computes before": lambda: linear(X.exp(), WEIGHT),
    "torch computes after": lambda: linear(X, WEIGHT) + 1,
    "torch writes": lambda: linear(X, WEIGHT).mul_(2),
    "torch copies": lambda: linear(X.t().contiguous().t(), WEIGHT),
    "a value is read": lambda: linear(X, WEIGHT) if X.sum().item() else X,
    "numbers are drawn": lambda: linear(X, torch.rand(20, 20)),
    "torch computes within an operator": lambda: _half(),
    "nothing is launched": lambda: X[:1],
}


def _half() -> Tensor:
    return causal_conv1d_step(torch.zeros(2, 20, 3, dtype=torch.float16), X, torch.randn(20, 4))


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_more_than_launches_is_not_recorded_but_runs(why: str) -> None:
    function = REFUSED[why]
    torch.manual_seed(0)
    expected = function()
    torch.manual_seed(0)
    result, recording = record(function, [X])
    assert result.equal(expected)
    assert recording is None


def test_launches_of_other_threads_and_later_ones_are_not_noted() -> None:
    with native.noted() as launches:
        linear(X, WEIGHT)
    linear(X, WEIGHT)
    assert len(launches) == 1
