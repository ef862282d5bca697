"""The scan's CPU kernels against float64, with each instruction set; steps: test_selective_scan_step_cpu.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selective_ssm.ops import native, selective_scan
from selective_ssm.ops.selective_scan import cpu
from selective_ssm.ops.selective_scan.inputs import Inputs, Options
from tests.ops import oracle
from tests.ops.cases import ScanCase
from tests.ops.guards import Guards
from tests.ops.launches import poison
from tests.ops.test_selective_scan_cuda import CASES, Case, assert_alike, expected, results
from tests.tolerance import assert_close_to_float64

OPS = torch.ops.selective_ssm
BRAIN, SINGLE = torch.bfloat16, torch.float32
LONG_PACK = (0, 300, 1, 0, 2, 500, 63, 0)  # over several windows of 128 tokens, which sequences share
needs_library = pytest.mark.skipif(native.explain() is not None, reason=str(native.explain()))


def served(case: Case) -> Case:
    """With another dtype where that of the sequence is not served."""
    scan = case.scan if case.scan.dtype != torch.float16 else replace(case.scan, dtype=BRAIN)
    dtypes = tuple((name, BRAIN if name == "u" else dtype) for name, dtype in case.dtypes)
    return replace(case, scan=scan, dtypes=dtypes, lanes=8, pieces=1)


def our_scan(**arguments: Any) -> Any:
    return selective_scan(**arguments, return_final_state=True, backend="cpu")


def plain_scan(**arguments: Any) -> Any:
    return selective_scan(**arguments, return_final_state=True, backend="reference")


def in_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def assert_close(case: Case, ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    names = ["out", "final state", *case.arguments()[0]]
    for name, x, reference, truth in zip(names, ours, plain, exact, strict=True):
        assert x.dtype == reference.dtype
        assert_close_to_float64(x, reference, truth, summed=case.terms(name), name=name)


def assert_case(case: Case) -> None:
    """By the rule; the float64 truth of what is long is the reference's."""
    case = served(case)
    if case.scan.batch * (sum(case.scan.lengths) or case.scan.length) < 400:
        plain, exact = expected(case)
    else:
        plain, exact = (results(case, plain_scan, place) for place in (torch.clone, in_double))
    assert_close(case, results(case, our_scan, torch.clone), plain, exact)


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected(served(CASES[case]))
    poison(monkeypatch)
    assert_case(CASES[case])


@needs_library
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN])
@pytest.mark.parametrize("states", [1, 3, 16, 64, 256])
@pytest.mark.parametrize("length", [1, 2, 63, 1000])
def test_lengths_and_states(length: int, states: int, dtype: torch.dtype) -> None:
    reverse = states % 2 == 0
    assert_case(Case(ScanCase(batch=1, length=length, channels=5, state=states, dtype=dtype, reverse=reverse)))


@needs_library
@pytest.mark.parametrize(
    "scan",
    [
        ScanCase(lengths=LONG_PACK, channels=21),
        ScanCase(lengths=LONG_PACK, channels=21, reverse=True, discretization="zoh", fixed="B"),
        ScanCase(lengths=LONG_PACK, channels=21, reverse=True, fixed="BC", dtype=BRAIN),
        ScanCase(length=300, channels=150, state=5, groups=2, batch=3, discretization="zoh"),
        ScanCase(length=300, channels=1100, state=3, batch=1, dtype=BRAIN, optional="z"),
        ScanCase(length=400, channels=66, state=6, groups=33, batch=1, fixed="C", delta_softplus=False),
        ScanCase(length=260, channels=3, state=2, batch=20, reverse=True),
    ],
    ids=lambda scan: f"{scan.batch} x {sum(scan.lengths) or scan.length} x {scan.channels}, {scan.discretization}",
)
def test_beyond_a_window_a_block_and_a_task(scan: ScanCase, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    assert_case(Case(scan, dtypes=(("cu_seqlens", torch.int64),)))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any),
    packed=st.booleans(),
    state=st.integers(1, 9),
    channels=st.integers(4, 20),  # of one alone a sum may be small by chance, and its rounding large beside it
    groups=st.sampled_from([None, 1, 3]),
    fixed=st.sampled_from(["", "B", "C", "BC"]),
    optional=st.sampled_from(["", "D", "z", "b", "i", "Dzbi"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["euler", "zoh"])),
)
@needs_library
def test_any_shape(
    lengths: list[int],
    packed: bool,
    state: int,
    channels: int,
    groups: int | None,
    fixed: str,
    optional: str,
    flags: tuple[bool, bool, bool, str],
) -> None:
    softplus, reverse, strided, discretization = flags
    scan = ScanCase(
        batch=1, length=sum(lengths), lengths=tuple(lengths) if packed else (), channels=channels * (groups or 1),
        state=state, groups=groups, fixed=fixed, optional=optional, delta_softplus=softplus, reverse=reverse,
        discretization=discretization, strided=strided,
    )  # fmt: skip
    assert_case(Case(scan))


@needs_library
def test_slow_decays_do_not_drift() -> None:
    """Where every token is alike and little is forgotten, roundings to the same side would add up."""
    tensors, _ = ScanCase(batch=1, length=3000, channels=16, state=2, optional="i").arguments()
    with torch.no_grad():
        tensors["A"].copy_(torch.tensor([-1.0, -0.3]))
        tensors["delta"].sub_(6)
        for name in ("B", "C"):
            tensors[name].copy_(tensors[name][:, :1].expand(1, 3000, 2))

    def run(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        inputs = {name: oracle.cast(x, dtype) for name, x in tensors.items()}
        out, final = function(**inputs, delta_softplus=True)
        return [out, final, *torch.autograd.grad(out.sum() + final.sum(), list(inputs.values()))]

    plain, exact = run(plain_scan, SINGLE), run(plain_scan, torch.float64)
    for name, x, reference, truth in zip(["out", "final", *tensors], run(our_scan, SINGLE), plain, exact, strict=True):
        assert_close_to_float64(x, reference, truth, summed=3000, multiple=3, name=name)


@needs_library
@pytest.mark.parametrize("rate", [0.0, -1e4, -1e-30])
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_extreme_rates_stay_finite(rate: float, discretization: str) -> None:
    case = Case(ScanCase(delta_softplus=False, discretization=discretization))
    tensors, options = case.arguments()
    tensors["A"].fill_(rate)
    tensors["delta"][:, ::2] = 0

    def run(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        inputs = {name: oracle.cast(x, dtype) for name, x in tensors.items()}
        out, final = function(**inputs, **options)
        return [out, final, *torch.autograd.grad(out.sum() + final.sum(), list(inputs.values()))]

    assert_close(case, run(our_scan, SINGLE), run(plain_scan, SINGLE), run(plain_scan, torch.float64))


@needs_library
@pytest.mark.parametrize("layout", ["expanded", "length inside", "channels apart"])
def test_gradients_of_any_layout(layout: str) -> None:
    tensors, options = ScanCase(channels=40, length=20).arguments()
    d_out = {
        "expanded": torch.randn(1, 1, 40).expand(2, 20, 40),
        "length inside": torch.randn(2, 40, 20).transpose(1, 2),
        "channels apart": torch.randn(2, 20, 80)[..., ::2],
    }[layout]
    d_final = torch.randn(4, 2, 40).permute(1, 2, 0)

    def gradient(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(**tensors, **options), list(tensors.values()), (d_out, d_final))

    assert_alike(gradient(our_scan), gradient(plain_scan))


@needs_library
def test_small_tensors_of_any_layout() -> None:
    """A, D, delta_bias, the initial state and the offsets need not be contiguous."""
    case = Case(ScanCase(channels=40, state=16, lengths=(3, 0, 7)))

    def spaced(x: Tensor) -> Tensor:
        if x.dim() == 1:
            return x.repeat_interleave(2)[::2]
        return x.movedim(-1, 0).contiguous().movedim(0, -1) if x.shape[-2:] == (40, 16) else x.clone()

    ours, plain = results(case, our_scan, spaced), results(case, our_scan, torch.clone)
    assert all(torch.equal(x, y) for x, y in zip(ours, plain, strict=True))


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN])
@pytest.mark.parametrize("lengths", [(), LONG_PACK])
def test_nothing_beside_a_tensor_is_touched(dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    case = Case(ScanCase(channels=21, state=5, lengths=lengths, dtype=dtype, length=130))
    plain = results(case, our_scan, torch.clone)
    guards = Guards()
    with guards.allocating():
        found = results(case, our_scan, lambda x: guards.copy(x, "cpu") if x.is_floating_point() else x)
    assert guards.intact()
    assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["u", "delta", "B", "z"])
@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_not_a_number_stays_in_its_own_sequence(name: str, value: float, reverse: bool) -> None:
    lengths = (20, 0, 33, 130, 5)
    tensors, options = ScanCase(lengths=lengths, channels=21, state=5, reverse=reverse).arguments()

    def run(function: Callable[..., Any]) -> list[Tensor]:
        outputs = function(**tensors, **options)
        weights = [torch.ones_like(x) for x in outputs]
        return [*outputs, *torch.autograd.grad(outputs, [tensors[k] for k in ("u", "initial_state")], weights)]

    clean = run(our_scan)
    with torch.no_grad():
        tensors[name][0, 25], tensors[name][0, 60] = value, value
    dirty, plain = run(our_scan), run(plain_scan)
    for k in (0, 1):
        assert torch.equal(dirty[k].isfinite(), plain[k].isfinite())
    for k in (0, 2):  # out and the gradient of u
        assert torch.equal(dirty[k][:, :20], clean[k][:, :20])
        assert torch.equal(dirty[k][:, 183:], clean[k][:, 183:])
    for k in (1, 3):  # final state and the gradient of the initial one
        assert torch.equal(dirty[k][[0, 1, 4]], clean[k][[0, 1, 4]])


@needs_library
@pytest.mark.parametrize("name", ["B", "C"])
def test_infinity_in_a_map_is_infinity_in_gradients(name: str) -> None:
    """The vector of three channels has thirteen lanes that are none, where 0 meets infinity."""
    tensors, options = ScanCase(batch=1, length=4, channels=3, state=1, optional="", delta_softplus=False).arguments()
    with torch.no_grad():
        for x in tensors.values():
            x.abs_()
        tensors["A"].neg_()
        tensors[name][0, 2] = math.inf

    def run(function: Callable[..., Any]) -> list[Tensor]:
        out, _ = function(**tensors, **options)
        return list(torch.autograd.grad(out.sum(), [tensors["B"], tensors["C"]]))

    for ours, plain in zip(run(our_scan), run(plain_scan), strict=True):
        assert torch.equal(ours.isnan(), plain.isnan())
        assert torch.equal(ours.isinf(), plain.isinf())


@needs_library
@pytest.mark.parametrize("reverse", [False, True])
def test_offsets_that_slip_through_never_leave_the_row(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every token gets a value."""
    tensors, _ = ScanCase(channels=21, lengths=(70, 79, 1)).arguments()
    poison(monkeypatch)
    B, C = (tensors[name].unsqueeze(2) for name in ("B", "C"))
    rest = (tensors[name] for name in ("D", "z", "delta_bias", "initial_state"))
    inputs = (tensors["u"], tensors["delta"], tensors["A"], B, C, *rest)
    for offsets in ([5, 1000, -3, 20], [150, 0, 150, 150], [-9, -9, -9, -9], [90, 60, 30, 0], [0, 2**31 - 1, 0, 150]):
        options = (torch.tensor(offsets, dtype=torch.int32), True, reverse, "euler", True, True, "cpu")
        out, final, _ = OPS.selective_scan(*inputs, *options)
        found = torch.autograd.grad((out.sum(), final.sum()), list(tensors.values()))
        assert all(x.isfinite().all() for x in (out, final, *found))


@needs_library
def test_the_number_of_threads_changes_no_bit() -> None:
    cases = [Case(ScanCase(length=150, channels=140, state=5, batch=3)), Case(ScanCase(lengths=LONG_PACK, channels=70))]
    try:
        for case in cases:
            torch.set_num_threads(1)
            first = results(case, our_scan, torch.clone)
            for count in (2, 3, 7):
                torch.set_num_threads(count)
                assert all(map(torch.equal, results(case, our_scan, torch.clone), first))
    finally:
        torch.set_num_threads(1)


class Made(TorchDispatchMode):
    """Remembers the bytes of all storages that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self._kept: list[Tensor] = []  # so that no address comes up twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.bytes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                self._kept.append(x)
        return result


@needs_library
@pytest.mark.parametrize(
    "sizes",
    [(1, 2048, 1536), (4, 512, 1536), (40, 100, 512), (1, 16000, 130), (1, 16384, 64), (1, 32768, 32), (1, 65536, 16)],
)
def test_memory_beyond_inputs_outputs_and_gradients(sizes: tuple[int, int, int]) -> None:
    """A quarter of an fp32 sequence, for one thread; each further one has scratch memory of its own."""
    batch, length, channels = sizes
    case = ScanCase(batch=batch, length=length, channels=channels, state=16, optional="Dzb")
    tensors = {name: x.detach() for name, x in case.arguments()[0].items()}
    inputs = Inputs(**tensors, initial_state=None, cu_seqlens=None)
    options = Options(True, False, "euler")
    d_out = torch.randn(sizes)
    with Made() as made:
        out, final, kept = cpu.forward(inputs, options, True)
        assert kept is not None
        found = [out, final, *(x for x in cpu.backward(d_out, None, kept, inputs, options) if x is not None)]
    given = {x.untyped_storage().data_ptr() for x in (*found, *tensors.values(), d_out)}
    beyond = sum(size for address, size in made.bytes.items() if address not in given)
    assert beyond <= 4 * d_out.numel() / 4


@needs_library
def test_the_operator_is_well_formed() -> None:
    tensors, _ = ScanCase(channels=6).arguments()
    inputs = (*tensors.values(), None, True, False, "zoh", True, True, "cpu")
    torch.library.opcheck(OPS.selective_scan, inputs)
    given = [x[:, 0].detach() if x.shape[:2] == (2, 37) else x.detach() for x in tensors.values()]
    step = (given.pop(), *given, True, False, "zoh", None, "cpu")
    torch.library.opcheck(OPS.selective_scan_step, step)


def test_without_the_library_the_reference_serves(library_is: Callable[[Path | None], None]) -> None:
    library_is(None)
    tensors, options = ScanCase().arguments()
    assert torch.equal(selective_scan(**tensors, **options), plain_scan(**tensors, **options)[0])
    with pytest.raises(ValueError, match="'cpu' cannot run selective_scan here: the CPU library was not built"):
        our_scan(**tensors, **options)


@needs_library
def test_the_library_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SELECTIVE_SSM_BACKEND", raising=False)
    tensors, options = ScanCase().arguments()
    called: list[str] = []
    function = native.function
    monkeypatch.setattr(native, "function", lambda name: (called.append(name), function(name))[1])
    selective_scan(**tensors, **options).sum().backward()
    assert called == ["selective_scan_forward", "selective_scan_backward"]
    for unserved in (torch.float64, torch.float16):
        others, options = ScanCase(dtype=unserved).arguments()
        selective_scan(**others, **options)
    assert len(called) == 2
