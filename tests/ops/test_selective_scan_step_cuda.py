"""The CUDA kernel of one token of the selective scan against float64: in the emulator, and on a GPU if there is one."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from selective_ssm.ops import nvrtc
from selective_ssm.ops.selective_scan import reference, step_cuda
from selective_ssm.ops.selective_scan.inputs import Options, StepInputs
from tests.ops import emulator
from tests.ops.launches import emulate, poison
from tests.tolerance import assert_close_to_float64

needs_emulator = pytest.mark.skipif(emulator.explain() is not None, reason=str(emulator.explain()))
needs_gpu = pytest.mark.skipif(nvrtc.explain() is not None, reason=str(nvrtc.explain()))


@dataclass(frozen=True)
class StepCase:
    batch: int = 4
    channels: int = 12
    state: int = 16
    groups: int = 1
    fixed: str = ""  # which of "B", "C" are time-invariant
    optional: str = "Dzb"  # which of D, z and delta_bias are given
    dtype: torch.dtype = torch.float32
    map_dtype: torch.dtype | None = None  # of B and C, where it is not that of the others
    slots: tuple[int, ...] = ()  # state_indices
    apart: int = 1  # numbers between two states of a channel
    delta_scale: float = 1.0
    delta_softplus: bool = True
    discretization: str = "euler"

    def arguments(self) -> tuple[Tensor, StepInputs, Options, Tensor | None]:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        def sequence() -> Tensor:
            return normal(self.batch, 3 * self.channels)[:, self.channels : 2 * self.channels]

        def map_of(name: str) -> Tensor:
            shape = (self.channels, self.state) if name in self.fixed else (self.batch, self.groups, self.state)
            return normal(*shape, dtype=self.map_dtype or self.dtype)

        single = torch.float32
        rates = -torch.rand(self.channels, self.state, generator=generator) * 4 - 0.1
        inputs = StepInputs(
            u=sequence(),
            delta=sequence() * self.delta_scale,
            A=rates,
            B=map_of("B"),
            C=map_of("C"),
            D=normal(self.channels, dtype=single) if "D" in self.optional else None,
            z=sequence() if "z" in self.optional else None,
            delta_bias=normal(self.channels, dtype=single).abs() if "b" in self.optional else None,
        )
        slots = 7 if self.slots else self.batch
        state = normal(slots, 2, self.channels, self.state * self.apart, dtype=single)[:, 1, :, :: self.apart]
        indices = torch.tensor(self.slots) if self.slots else None
        return state, inputs, Options(self.delta_softplus, False, self.discretization), indices


CASES = {
    "vectors": StepCase(),
    "small steps": StepCase(optional="Dz", delta_scale=0.001, delta_softplus=False),
    "large steps": StepCase(delta_scale=30),
    "zero-order hold": StepCase(discretization="zoh", slots=(3, -1, 0, 6)),
    "zero-order hold, small steps": StepCase(discretization="zoh", delta_scale=1e-3, optional="Dz"),
    "groups": StepCase(groups=4, slots=(3, -1, 0, 6)),
    "fixed maps": StepCase(fixed="BC", map_dtype=torch.bfloat16),
    "bfloat16": StepCase(dtype=torch.bfloat16, fixed="B", channels=70),
    "no vectors": StepCase(state=6, dtype=torch.float16, slots=(-1, 6, 2, 1)),
    "states apart": StepCase(apart=2, slots=(-1, 6, 2, 1)),
    "one state": StepCase(state=1, optional=""),
    "many states": StepCase(state=260, channels=3, discretization="zoh"),
    "many rows": StepCase(batch=3000, channels=100, optional="D"),
}


def assert_case(case: StepCase, device: str, module: ModuleType = step_cuda) -> None:
    state, inputs, options, indices = case.arguments()

    def stepped(backend: object, place: str, wide: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        moved = torch.empty_strided(state.shape, state.stride(), dtype=wide or state.dtype, device=place).copy_(state)
        some = StepInputs(*(None if x is None else x.to(place, wide) for x in inputs))
        out = backend.step(moved, some, options, None if indices is None else indices.to(place))
        return out.cpu(), moved.cpu()

    plain, exact = stepped(reference, "cpu"), stepped(reference, "cpu", torch.float64)
    for x, expected, truth in zip(stepped(module, device), plain, exact, strict=True):
        assert x.dtype == expected.dtype
        assert_close_to_float64(x, expected, truth)


@needs_emulator
@pytest.mark.parametrize("case", [name for name in CASES if name != "many rows"])
def test_agrees_with_float64(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, step_cuda)
    assert_case(CASES[case], "cpu")


@needs_emulator
def test_of_many_channels_a_thread_serves_twice_as_many_states(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, step_cuda)
    monkeypatch.setattr(step_cuda, "_MANY_THREADS", 1)
    assert step_cuda.lanes_of(16, 4, 12) == 2
    for case in (StepCase(batch=5), StepCase(batch=4, slots=(3, -1, 0, 6)), StepCase(batch=3, fixed="BC")):
        assert_case(case, "cpu")


@needs_gpu
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64_on_a_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    assert_case(CASES[case], "cuda")


@needs_emulator
def test_slots_that_slip_through_never_leave_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    state, inputs, options, _ = StepCase(slots=(0,)).arguments()
    before = state.clone()
    emulate(monkeypatch, step_cuda)
    out = step_cuda.step(state, inputs, options, torch.tensor([99, -1, -(2**40), -3]))
    assert out[0].isfinite().all()
    assert out[1:].eq(0).all()
    assert torch.equal(state[:6], before[:6])


@needs_emulator
@pytest.mark.parametrize("states", [5, 16, 24])
def test_lanes_without_a_state_make_no_nan_of_infinity(states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state, inputs, options, _ = StepCase(state=states, optional="").arguments()
    inputs.u[0, 3] = torch.inf
    inputs.B.abs_()
    inputs.C.abs_()
    emulate(monkeypatch, step_cuda)
    out = step_cuda.step(state, inputs, options, None)
    assert out[0, 3] == torch.inf
    assert out.isfinite().sum() == out.numel() - 1


@needs_gpu
def test_steps_can_be_captured() -> None:
    state, inputs, options, indices = CASES["zero-order hold"].arguments()
    assert indices is not None
    inputs = StepInputs(*(None if x is None else x.cuda() for x in inputs))
    eager, captured, indices = state.cuda().contiguous(), state.cuda().contiguous(), indices.cuda()
    expected = step_cuda.step(eager, inputs, options, indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step_cuda.step(captured, inputs, options, indices)
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(captured, eager)


@needs_emulator
@pytest.mark.parametrize("fixed", ["", "B", "BC"])
def test_matrices_mean_what_they_mean_to_the_reference(fixed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """B and C without an axis of groups; parameters that are views."""
    state, inputs, options, _ = StepCase(fixed=fixed).arguments()
    B, C = (x.flatten(0, -2) for x in (inputs.B, inputs.C))  # (B, 1, N) -> (B, N)
    D, bias, _ = torch.randn(len(inputs.A), 3).unbind(1)
    inputs = inputs._replace(B=B, C=C, D=D, delta_bias=bias)
    expected_state = state.clone()
    expected = reference.step(expected_state, inputs, options, None)
    emulate(monkeypatch, step_cuda)
    assert torch.allclose(step_cuda.step(state, inputs, options, None), expected, atol=1e-5)
    assert torch.allclose(state, expected_state, atol=1e-5)
