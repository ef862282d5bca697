"""The scan's CUDA kernels against float64: in the emulator everywhere, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from selective_ssm.ops import nvrtc, selective_scan
from selective_ssm.ops.selective_scan import cuda, plan
from tests.ops import emulator, oracle
from tests.ops.cases import ScanCase
from tests.ops.launches import emulate, poison
from tests.ops.wanted import Wanted, prepare_emulated, wanted_by, with_multiprocessors
from tests.tolerance import assert_close_to_float64

OPS = torch.ops.selective_ssm
needs_emulator = pytest.mark.skipif(emulator.explain() is not None, reason=str(emulator.explain()))
needs_gpu = pytest.mark.skipif(nvrtc.explain() is not None, reason=str(nvrtc.explain()))

PACK = (5, 0, 64, 1, 40, 0, 65, 12, 0)
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    scan: ScanCase
    lanes: int = 8
    pieces: int = 1
    dtypes: tuple[tuple[str, torch.dtype], ...] = ()  # where they are not that of the others
    delta_scale: float = 1.0
    weighted: tuple[int, ...] = (0, 1)  # of (out, final state) those that the loss depends on

    def arguments(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, options = self.scan.arguments()
        tensors = {name: x.detach().to(dict(self.dtypes).get(name, x.dtype)) for name, x in tensors.items()}
        tensors["delta"] *= self.delta_scale
        if "cu_seqlens" in options:
            options["cu_seqlens"] = options["cu_seqlens"].to(dict(self.dtypes).get("cu_seqlens", torch.int32))
        return tensors, options

    def terms(self, name: str) -> int:
        """How many terms a gradient sums."""
        scan = self.scan
        if name in {"A", "D", "delta_bias"} or (name in {"B", "C"} and name in scan.fixed):
            return sum(scan.lengths) or scan.batch * scan.length
        return scan.channels // (scan.groups or 1) if name in {"B", "C"} else 0


# Few configurations serve many cases, since each has its kernels compiled.
VECTORS = ScanCase(channels=40, state=16, dtype=BRAIN, length=65)  # rows of whole vectors; blocks that are not full
ODD = ScanCase(channels=5, state=3, length=65, discretization="zoh", optional="Dbi")
MIXED = (("u", HALF), ("delta", BRAIN), ("z", SINGLE), ("B", BRAIN), ("C", SINGLE))
CASES = {
    "two lanes": Case(VECTORS, lanes=2),
    "parts of a projection": Case(replace(VECTORS, lengths=PACK, strided=True), lanes=2),
    "four lanes": Case(replace(VECTORS, length=150, reverse=True), lanes=4),
    "eight lanes": Case(replace(VECTORS, length=63)),
    "one token": Case(replace(VECTORS, length=1)),
    "two tokens": Case(replace(VECTORS, length=2, reverse=True)),
    "a chunk": Case(replace(VECTORS, length=64)),
    "three chunks": Case(replace(VECTORS, batch=1, length=150, optional="z")),
    "several blocks": Case(replace(VECTORS, batch=1, length=5, channels=136), lanes=2),
    "groups": Case(replace(VECTORS, channels=48, groups=3, length=33), lanes=4),
    "a pack": Case(replace(VECTORS, lengths=PACK)),
    "a pack, reverse": Case(replace(VECTORS, lengths=PACK, reverse=True, optional="z")),
    "a pack that begins and ends with nothing": Case(replace(VECTORS, lengths=(0, 0, 70, 0))),
    "more sequences than slots": Case(replace(VECTORS, lengths=(3, 1, 0, 2, 4) * 3)),
    "pieces": Case(replace(VECTORS, length=150), pieces=3),
    "more pieces than chunks": Case(replace(VECTORS, length=65, reverse=True, optional="z"), pieces=5),
    "pieces of a pack": Case(
        replace(VECTORS, lengths=(*PACK, 150), reverse=True), pieces=2, dtypes=(("cu_seqlens", torch.int64),)
    ),
    "no gradient through the final state": Case(VECTORS, weighted=(0,)),
    "a gradient through the final state alone": Case(VECTORS, weighted=(1,)),
    "zero-order hold, odd sizes": Case(ODD),
    "zero-order hold, small steps": Case(replace(ODD, optional="i", delta_softplus=True), delta_scale=1e-3),
    "zero-order hold, a pack in pieces": Case(replace(ODD, lengths=PACK, reverse=True), pieces=2),
    "large steps": Case(replace(VECTORS, optional="Dz"), delta_scale=30),
    "one state, fixed maps, no softplus": Case(
        ScanCase(length=65, channels=9, state=1, fixed="BC", optional="", delta_softplus=False)
    ),
    "fixed B, many states": Case(
        ScanCase(channels=18, state=40, groups=2, length=66, fixed="B", dtype=HALF, optional="z"), lanes=2
    ),
    "fixed C, many states, pieces": Case(
        ScanCase(channels=8, state=40, batch=1, length=130, fixed="C", discretization="zoh"), lanes=4, pieces=2
    ),
    "mixed dtypes": Case(replace(VECTORS, groups=5, lengths=(20, 0, 45)), lanes=2, dtypes=MIXED),
    "mixed dtypes, out of alignment": Case(
        replace(VECTORS, channels=21, state=10, groups=3, strided=True), lanes=4, dtypes=MIXED
    ),
}


def results(case: Case, function: Callable[..., Any], place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The outputs and every gradient, on the CPU; `place` puts each argument where it is to be."""
    tensors, options = case.arguments()
    tensors = {name: place(x).requires_grad_() for name, x in tensors.items()}
    options = {name: place(x) if isinstance(x, Tensor) else x for name, x in options.items()}
    outputs = function(**tensors, **options)
    generator = torch.Generator().manual_seed(1)
    low = case.arguments()[0]["u"].dtype
    weights = [torch.randn(x.shape, generator=generator).to(d) for x, d in zip(outputs, (low, SINGLE), strict=True)]
    loss = sum((outputs[i] * weights[i].to(outputs[i])).sum() for i in case.weighted)
    gradients = torch.autograd.grad(loss, list(tensors.values()), materialize_grads=True)
    return [x.detach().cpu() for x in (*outputs, *gradients)]


def on_cuda(x: Tensor) -> Tensor:
    """On the GPU, as it lies in memory."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)


def our_scan(**arguments: Any) -> Any:
    return selective_scan(**arguments, return_final_state=True, backend="cuda")


@functools.cache
def expected(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """What the reference and the float64 recurrence make of a case."""

    def plain(**arguments: Any) -> Any:
        return selective_scan(**arguments, return_final_state=True, backend="reference")

    def wide(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    return results(case, plain, torch.clone), results(case, oracle.scan, wide)


def assert_case(case: Case, place: Callable[[Tensor], Tensor]) -> None:
    plain, exact = expected(replace(case, lanes=8, pieces=1))
    with plan.overridden(lanes=case.lanes, pieces=case.pieces):
        ours = results(case, our_scan, place)
    names = ["out", "final state", *case.arguments()[0]]
    for name, x, reference, truth in zip(names, ours, plain, exact, strict=True):
        assert x.dtype == reference.dtype
        assert_close_to_float64(x, reference, truth, summed=case.terms(name), name=name)


def emulate_fenced(
    monkeypatch: pytest.MonkeyPatch, order: str | int = "forward", most_shared: int = 227 * 1024
) -> None:
    """The backend runs on CPU tensors; what it allocates is full of NaN and ends where no access is allowed."""
    emulate(monkeypatch, cuda, order=order)
    with_multiprocessors(monkeypatch, 1, most_shared)
    for owner, name in ((torch, "empty_like"), (Tensor, "new_empty")):
        allocate = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, allocate=allocate, **k: emulator.fenced(allocate(*a, **k)))


class Launched(NamedTuple):
    name: str
    shared: int
    threads: int
    parameters: Any


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """What is launched from here on."""
    launched, find = [], nvrtc.kernel

    def kernel(source: Path, name: str, defines: nvrtc.Defines, device: int, shared: int = 0) -> Any:
        found = find(source, name, defines, device, shared)

        def launch(grid: tuple[int, int, int], threads: int, parameters: ctypes.Structure, stream: int) -> None:
            launched.append(Launched(name, shared, dict(defines).get("THREADS", threads), parameters))
            found(grid, threads, parameters, stream)

        return launch

    monkeypatch.setattr(nvrtc, "kernel", kernel)
    return launched


@pytest.fixture(scope="module", autouse=True)
def prepared(request: pytest.FixtureRequest) -> None:
    def want(name: str, most_shared: int = 227 * 1024) -> list[Wanted]:
        case = CASES[name]
        with plan.overridden(lanes=case.lanes, pieces=case.pieces):
            run = functools.partial(results, case, our_scan, torch.clone)
            return wanted_by(run, cuda, multiprocessors=1, most_shared=most_shared)

    prepare_emulated(request, "test_agrees_with_float64", want)
    little = functools.partial(want, most_shared=99 * 1024)
    prepare_emulated(request, "test_agrees_with_float64_where_blocks_have_little_memory", little)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_fenced(monkeypatch)


@needs_emulator
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected(replace(CASES[case], lanes=8, pieces=1))  # before memory is fenced, which is slow
    emulate_fenced(monkeypatch)
    assert_case(CASES[case], emulator.fenced)


@needs_emulator
@pytest.mark.parametrize("case", ["eight lanes", "fixed B, many states", "pieces of a pack"])
def test_agrees_with_float64_where_blocks_have_little_memory(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on consumers' GPUs, where half the threads go backward."""
    expected(replace(CASES[case], lanes=8, pieces=1))
    emulate_fenced(monkeypatch, most_shared=99 * 1024)
    launched = recorded(monkeypatch)
    assert_case(CASES[case], emulator.fenced)
    backward = [one for one in launched if one.name.startswith("selective_scan_backward")]
    assert len(backward) == (1 if CASES[case].pieces == 1 else 3)
    assert {one.threads for one in backward} == {plan.THREADS // 2}
    assert all(one.shared <= 99 * 1024 for one in launched)


@needs_gpu
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64_on_a_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected(replace(CASES[case], lanes=8, pieces=1))
    poison(monkeypatch)
    assert_case(CASES[case], on_cuda)


@needs_emulator
def test_inference_computes_the_same_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = CASES["pieces of a pack"].arguments()
    arguments, length = (*scan_arguments(tensors, options["cu_seqlens"], True)[:-2],), tensors["u"].shape[1]
    emulate_fenced(monkeypatch)
    launched, shapes, allocate = recorded(monkeypatch), [], Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda x, *shape: shapes.append(shape) or allocate(x, *shape))
    runs, kept, states = [], [], (1, (length - 1) // plan.CHUNK, *tensors["A"].shape)
    with torch.no_grad(), plan.overridden(lanes=8, pieces=2):
        for save in (True, False):
            launched.clear(), shapes.clear()
            runs.append(OPS.selective_scan(*arguments, save, "cuda"))
            assert [one.name for one in launched][-1] == "selective_scan_forward"
            kept.append((states in shapes, [one.parameters.kept is not None for one in launched]))
    (out, final, saved), (same_out, same_final, nothing) = runs
    assert states[1] >= 3
    assert kept == [(True, [True] * 3), (False, [False] * 3)]
    assert saved.shape == states
    assert nothing.shape == (0,)
    assert torch.equal(out, same_out)
    assert torch.equal(final, same_final)


@needs_emulator
@pytest.mark.parametrize("case", ["more sequences than slots", "pieces of a pack", "fixed C, many states, pieces"])
def test_threads_may_run_in_any_order(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for order in emulator.ORDERS:
        with monkeypatch.context() as patch, plan.overridden(lanes=CASES[case].lanes, pieces=CASES[case].pieces):
            emulate_fenced(patch, order)
            runs.append(results(CASES[case], our_scan, torch.clone))
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


def scan_arguments(tensors: dict[str, Tensor], offsets: Tensor | None, reverse: bool) -> tuple[Any, ...]:
    """Those of the registered operator, which checks no values; the last two are `save` and the backend."""
    maps = (tensors[name].unsqueeze(2) for name in ("B", "C"))
    rest = (tensors.get(name) for name in ("D", "z", "delta_bias", "initial_state"))
    arguments = (tensors["u"], tensors["delta"], tensors["A"], *maps, *rest, offsets)
    return (*arguments, True, reverse, "euler", True, True, "cuda")


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("reverse", "pieces", "wide"), [(False, 1, torch.int32), (True, 2, torch.int64)])
def test_offsets_that_slip_through_never_leave_the_row(reverse: bool, pieces: int, wide: torch.dtype) -> None:
    for offsets in ([5, 1000, -3, 20], [150, 0, 150, 150], [-9, -9, -9, -9], [90, 60, 30, 0], [0, 2**31 - 1, 0, 150]):
        tensors, _ = replace(VECTORS, lengths=(70, 79, 1)).arguments()
        given = {name: emulator.fenced(x).requires_grad_() for name, x in tensors.items()}
        place = emulator.fenced(torch.tensor(offsets, dtype=wide))
        with plan.overridden(lanes=8, pieces=pieces):
            out, final, _ = OPS.selective_scan(*scan_arguments(given, place, reverse))
            gradients = torch.autograd.grad((out.sum(), final.sum()), list(given.values()))
        assert final.isfinite().all()
        assert [x.shape for x in gradients] == [x.shape for x in given.values()]


@needs_emulator
@pytest.mark.parametrize("layout", ["expanded", "length inside", "an odd place"])
def test_gradients_of_any_layout(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = replace(VECTORS, length=20).arguments()
    d_out = {
        "expanded": torch.randn(1, 1, 40).expand(2, 20, 40),
        "length inside": torch.randn(2, 40, 20).transpose(1, 2),
        "an odd place": torch.randn(2 * 20 * 40 + 1)[1:].view(2, 20, 40),
    }[layout].to(BRAIN)
    d_final = torch.randn(16, 2, 40).permute(1, 2, 0)

    def gradient(backend: str) -> tuple[Tensor, ...]:
        outputs = selective_scan(**tensors, **options, return_final_state=True, backend=backend)
        return torch.autograd.grad(outputs, list(tensors.values()), (d_out, d_final))

    plain = gradient("reference")
    emulate_fenced(monkeypatch)
    assert_alike(gradient("cuda"), plain)


def assert_alike(ours: Iterable[Tensor], plain: Iterable[Tensor]) -> None:
    """But for the rounding of bfloat16: what reads the wrong place is far off."""
    for x, y in zip(ours, plain, strict=True):
        assert torch.allclose(x.float(), y.float(), rtol=2e-2, atol=1e-2 * y.abs().max().item())


@needs_emulator
@pytest.mark.usefixtures("emulated")
def test_small_tensors_of_any_layout() -> None:
    """A, D, delta_bias, the initial state and the offsets need not be contiguous."""
    case = Case(replace(VECTORS, lengths=(3, 0, 7)))
    plain, _ = expected(case)

    def spaced(x: Tensor) -> Tensor:
        if x.dim() == 1:
            return x.repeat_interleave(2)[::2]
        return x.movedim(-1, 0).contiguous().movedim(0, -1) if x.shape[-2:] == (40, 16) else x.clone()

    assert_alike(results(case, our_scan, spaced), plain)
