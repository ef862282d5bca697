"""The reference scan against the float64 recurrence, forward and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from selective_ssm.ops import selective_scan, selective_scan_fn, selective_scan_step
from selective_ssm.ops.selective_scan import operands, reference
from selective_ssm.ops.selective_scan.inputs import Inputs, Options
from tests.ops import oracle
from tests.ops.cases import ScanCase, gradients
from tests.tolerance import assert_close_to_float64

SUMMED = {"A", "B", "C", "D", "delta_bias"}

CASES = {
    "plain": ScanCase(optional=""),
    "everything": ScanCase(),
    "odd": ScanCase(length=63, channels=5, state=3),
    "one token": ScanCase(length=1),
    "one channel, one state": ScanCase(batch=1, length=33, channels=1, state=1),
    "groups": ScanCase(groups=3),
    "fixed B": ScanCase(fixed="B"),
    "fixed B and C": ScanCase(fixed="BC", reverse=True),
    "fixed C, groups": ScanCase(fixed="C", groups=2),
    "strided": ScanCase(strided=True),
    "no softplus": ScanCase(delta_softplus=False),
    "reverse": ScanCase(reverse=True),
    "zoh": ScanCase(discretization="zoh"),
    "packed": ScanCase(lengths=(5, 0, 17, 1, 32, 0)),
    "packed, reverse, zoh": ScanCase(lengths=(0, 16, 33, 2), reverse=True, discretization="zoh"),
    "complex": ScanCase(complex_state=True),
    "complex, real maps": ScanCase(complex_state=True, complex_maps="", groups=2),
    "complex, zoh, packed": ScanCase(complex_state=True, discretization="zoh", lengths=(7, 20), fixed="BC"),
    "complex, packed, reverse": ScanCase(complex_state=True, complex_maps="C", lengths=(9, 0, 24), reverse=True),
    "many states": ScanCase(batch=1, length=20, channels=2, state=256),
    "one channel, packed": ScanCase(channels=1, lengths=(17, 3)),
    "bf16": ScanCase(dtype=torch.bfloat16),
    "bf16 with delta in fp32": ScanCase(dtype=torch.bfloat16, delta_dtype=torch.float32, strided=True),
    "fp16, packed": ScanCase(dtype=torch.float16, lengths=(3, 30)),
}  # fmt: skip


def run(
    case: ScanCase, seed: int, function: Any, dtype: torch.dtype | None = None, device: str = "cpu"
) -> list[torch.Tensor]:
    """(out, final state, gradients...) of `function` on the case's arguments, cast and moved if asked."""
    tensors, options = case.arguments(seed)
    if dtype is not None:
        tensors = {name: oracle.cast(x, dtype) for name, x in tensors.items()}
    tensors = {name: x.detach().to(device).requires_grad_() for name, x in tensors.items()}
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    outputs = function(**tensors, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device, case.dtype) for x in outputs]
    return [x.cpu() for x in (*outputs, *gradients(outputs, tensors, tuple(weights)))]


def scan_with_state(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """By the reference on a CPU, whatever is fastest on a GPU."""
    backend = None if arguments["u"].is_cuda else "reference"
    return selective_scan(**arguments, return_final_state=True, backend=backend)


def assert_case(case: ScanCase, seed: int = 0, device: str = "cpu") -> None:
    """out, final state, gradients: at most four times the error of the fp32 loop under autograd, plus the floor."""
    exact = run(case, seed, oracle.scan, torch.float64)
    loop = run(case, seed, oracle.scan, torch.float32)
    ours = run(case, seed, scan_with_state, device=device)
    tensors, _ = case.arguments(seed)
    length = sum(case.lengths) or case.length
    for name, x, plain, truth in zip(["out", "final state", *tensors], ours, loop, exact, strict=True):
        summed = length * case.batch * case.channels if name in SUMMED else 0
        assert_close_to_float64(x, plain, truth, multiple=4, summed=summed, name=name)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_the_recurrence_in_value_and_gradient(case: ScanCase) -> None:
    assert_case(case)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_small_blocks_change_nothing(case: ScanCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """One segment a block, so that states and gradients cross every border."""
    monkeypatch.setattr(operands, "BLOCK_ELEMENTS", 1)
    assert_case(case)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_the_recurrence_on_a_gpu(case: ScanCase) -> None:
    assert_case(case, device="cuda")


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    packed=st.booleans(),
    state=st.integers(1, 5),
    groups=st.sampled_from([None, 1, 2]),
    fixed=st.sampled_from(["", "B", "C", "BC"]),
    optional=st.sampled_from(["", "Dz", "bi", "Dzbi"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["euler", "zoh"])),
)
def test_any_shape(
    seed: int,
    lengths: list[int],
    packed: bool,
    state: int,
    groups: int | None,
    fixed: str,
    optional: str,
    flags: tuple[bool, bool, bool, bool, str],
) -> None:
    softplus, reverse, complex_state, strided, discretization = flags
    case = ScanCase(
        batch=1, length=sum(lengths), lengths=tuple(lengths) if packed else (), channels=4, state=state, groups=groups,
        fixed=fixed, optional=optional, complex_state=complex_state, delta_softplus=softplus, reverse=reverse,
        discretization=discretization, strided=strided,
    )  # fmt: skip
    assert_case(case, seed)


@pytest.mark.parametrize("rate", [0.0, -1e4])
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_extreme_rates_stay_finite(rate: float, discretization: str) -> None:
    case = ScanCase(delta_softplus=False, optional="i", discretization=discretization)
    tensors, options = case.arguments()
    tensors["A"] = torch.full_like(tensors["A"], rate if rate else -1.0).requires_grad_()
    tensors["delta"] = torch.full_like(tensors["delta"], 0.0 if rate == 0 else 1.0).requires_grad_()
    wide = {name: oracle.cast(x, torch.float64) for name, x in tensors.items()}
    ours, exact = scan_with_state(**tensors, **options), oracle.scan(**wide, **options)
    weights = tuple(torch.ones_like(x) for x in exact)
    for x, truth in zip(
        [*ours, *gradients(ours, tensors, weights)], [*exact, *gradients(exact, wide, weights)], strict=True
    ):
        assert_close_to_float64(x, truth, truth, summed=case.length * case.channels)


def test_not_a_number_stays_in_its_own_sequence() -> None:
    tensors, options = ScanCase(lengths=(20, 20), optional="").arguments()
    with torch.no_grad():
        tensors["u"][0, 5] = float("nan")
        tensors["B"][0, 19] = float("inf")
    out, final = scan_with_state(**tensors, **options)
    assert out[0, :5].isfinite().all()
    assert out[0, 5:20].isnan().all()
    assert out[0, 20:].isfinite().all()
    assert not final[0].isfinite().any()
    assert final[1].isfinite().all()
    out[0, 20:].sum().backward()
    assert tensors["u"].grad[0, 20:].isfinite().all()


def test_gradcheck_in_float64() -> None:
    case = ScanCase(
        batch=1, lengths=(3, 0, 18), channels=2, state=2, dtype=torch.float64, discretization="zoh", groups=2
    )  # fmt: skip
    tensors, options = case.arguments()
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *x: scan_with_state(**dict(zip(names, x, strict=True)), **options), tuple(tensors.values())
    )


class LargestTensor(TorchDispatchMode):
    """Watches what is made, and remembers the most elements that one tensor had."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_the_states_of_a_whole_sequence_are_never_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "BLOCK_ELEMENTS", 2**10)
    case = ScanCase(batch=1, length=4096, channels=8, state=16, groups=1, optional="")
    tensors, _ = case.arguments()
    inputs = Inputs(*(x.detach() for x in tensors.values()), None, None, None, None, None)
    options = Options(True, False, "euler")
    with LargestTensor() as largest:
        out, _, saved = reference.forward(inputs, options, True)
        reference.backward(torch.ones_like(out), None, saved, inputs, options)
    assert largest.numel <= 4 * case.length * case.channels


def test_the_gradient_of_a_linear_softplus_is_exact_in_float64() -> None:
    tensors, options = ScanCase(batch=1, length=3, channels=1, state=1, dtype=torch.float64, optional="").arguments()
    with torch.no_grad():
        tensors["delta"].fill_(20.5)
    expected = torch.autograd.grad(oracle.scan(**tensors, **options)[0].sum(), tensors["delta"])[0]
    (actual,) = torch.autograd.grad(selective_scan(**tensors, **options).sum(), tensors["delta"])
    assert (actual - expected).abs().max() <= 1e-14 * expected.abs().max()


def test_only_what_is_asked_for_is_kept() -> None:
    tensors, options = ScanCase(optional="").arguments()
    u, delta, A, B, C = tensors.values()
    flat = [u, delta, A, B.unsqueeze(2), C.unsqueeze(2), None, None, None, None, None]
    call = torch.ops.selective_ssm.selective_scan
    _, final, saved = call(*flat, options["delta_softplus"], False, "euler", False, False, None)
    assert final.numel() == saved.numel() == 0
    _, final, saved = call(*flat, options["delta_softplus"], False, "euler", True, True, None)
    assert final.shape == (2, 6, 4)
    assert saved.numel() <= 2 * 6 * 4 * (37 // reference.STEPS + 1)


def test_no_tokens_hand_the_state_through() -> None:
    tensors, options = ScanCase(length=0).arguments()
    out, final = scan_with_state(**tensors, **options)
    assert out.shape == (2, 0, 6)
    assert torch.equal(final, tensors["initial_state"])
    assert final.data_ptr() != tensors["initial_state"].data_ptr()
    final.sum().backward()
    assert torch.equal(tensors["initial_state"].grad, torch.ones_like(final))


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("complex_state", [False, True])
@pytest.mark.parametrize("fixed", ["", "BC"])
def test_steps_equal_the_scan(discretization: str, complex_state: bool, fixed: str) -> None:
    case = ScanCase(
        dtype=torch.float64, complex_state=complex_state, discretization=discretization, groups=2, fixed=fixed
    )
    tensors, options = case.arguments()
    out, final = scan_with_state(**tensors, **options)
    state = tensors.pop("initial_state").detach().clone()
    over_time = {"u", "delta", "z"} | ({"B", "C"} - set(fixed))
    for t in range(case.length):
        now = {name: x[:, t] if name in over_time else x for name, x in tensors.items()}
        y = selective_scan_step(state, **now, delta_softplus=True, discretization=discretization)
        assert (y - out[:, t]).abs().max() <= 1e-12 * out.abs().max()
    assert (state - final).abs().max() <= 1e-12 * final.abs().max()


def test_step_with_slots_and_padding() -> None:
    tensors, _ = ScanCase(length=1, optional="Dz").arguments()
    now = {k: x[:, 0].detach() if x.dim() == 3 else x.detach() for k, x in tensors.items()}
    states = torch.randn(5, 6, 4)
    before, two = states.clone(), states[[3, 1]].clone()
    expected = selective_scan_step(two, **now)
    out = selective_scan_step(states, **now, state_indices=torch.tensor([3, 1]))
    assert torch.equal(out, expected)
    assert torch.equal(states[[3, 1]], two)
    assert torch.equal(states[[0, 2, 4]], before[[0, 2, 4]])

    states = before.clone()
    out = selective_scan_step(states, **now, state_indices=torch.tensor([-1, 2], dtype=torch.int32))
    assert out[0].eq(0).all()
    assert torch.equal(states[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_length_last_entry_point() -> None:
    tensors, options = ScanCase(optional="Dzb", groups=2).arguments()
    turned = {k: x.movedim(1, -1) if x.dim() > 2 and k != "A" else x for k, x in tensors.items()}
    out, final = selective_scan(**tensors, **options, return_final_state=True)
    out_last, final_last = selective_scan_fn(**turned, delta_softplus=True, return_last_state=True)
    assert torch.equal(out_last, out.transpose(1, 2))
    assert torch.equal(final_last, final)
    assert torch.equal(selective_scan_fn(**turned, delta_softplus=True), out_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_length_last_entry_point_takes_interleaved_complex_maps(dtype: torch.dtype) -> None:
    tensors, options = ScanCase(optional="", complex_state=True, dtype=dtype).arguments()
    turned = {k: tensors[k].transpose(1, 2) for k in ("u", "delta")}
    for k in ("B", "C"):
        turned[k] = torch.view_as_real(tensors[k].transpose(1, 2).contiguous()).flatten(-2)
    expected = selective_scan(**tensors, **options).transpose(1, 2)
    assert torch.equal(selective_scan_fn(A=tensors["A"], **turned, delta_softplus=True), expected)
