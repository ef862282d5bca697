"""The convolution's CUDA kernels against float64: in the emulator everywhere, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selective_ssm.ops import causal_conv1d, causal_conv1d_step, nvrtc
from selective_ssm.ops.causal_conv1d import cuda
from selective_ssm.ops.causal_conv1d.plan import THREADS, plan
from tests.ops import emulator, oracle
from tests.ops.cases import gradients
from tests.ops.launches import emulate, poison
from tests.ops.test_causal_conv1d import arguments
from tests.ops.wanted import Wanted, prepare_emulated, wanted_by
from tests.tolerance import assert_close_to_float64

OPS = torch.ops.selective_ssm
needs_emulator = pytest.mark.skipif(emulator.explain() is not None, reason=str(emulator.explain()))
needs_gpu = pytest.mark.skipif(nvrtc.explain() is not None, reason=str(nvrtc.explain()))

PACK = (5, 0, 1, 2, 40, 0, 3, 12, 0)
VECTORS = {"channels": 8, "activation": "silu"}
CASES: dict[str, dict[str, Any]] = {
    "one token": VECTORS | {"length": 1},
    "fewer tokens than taps": VECTORS | {"length": 2, "reverse": True},
    "many runs": VECTORS | {"length": 300},
    "many runs, reverse": VECTORS | {"length": 300, "reverse": True},
    "a pack": VECTORS | {"lengths": PACK},
    "a pack, reverse": VECTORS | {"lengths": PACK, "reverse": True},
    "a pack of one": VECTORS | {"lengths": (70,), "optional": "i"},
    "a pack that begins and ends with nothing": VECTORS | {"lengths": (0, 0, 64, 0), "reverse": True},
    "neither bias nor state": VECTORS | {"length": 63, "optional": ""},
    "two columns of blocks": VECTORS | {"batch": 1, "length": 33, "channels": 520},
    "bfloat16": VECTORS | {"length": 63, "channels": 16, "dtype": torch.bfloat16},
    "bfloat16, a pack": VECTORS | {"lengths": PACK, "channels": 16, "dtype": torch.bfloat16, "reverse": True},
    "out of alignment": {"length": 63, "channels": 5, "width": 3, "dtype": torch.float16},
    "out of alignment, a pack": {"lengths": PACK, "channels": 5, "width": 3, "dtype": torch.float16},
    "one tap": {"lengths": PACK, "channels": 5, "width": 1, "reverse": True},
    "five taps": {"lengths": PACK, "channels": 8, "width": 5},
}


def tensors_of(case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return arguments(**case)


def results(
    function: Any, tensors: dict[str, torch.Tensor], options: dict[str, Any], device: str, **more: Any
) -> list[torch.Tensor]:
    """The outputs and every gradient, on the CPU."""
    given = {name: leaf(x, device) for name, x in tensors.items()}
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    outputs = function(**given, **options, **more)
    generator = torch.Generator().manual_seed(1)
    weights = tuple(torch.randn(x.shape, generator=generator).to(device, tensors["x"].dtype) for x in outputs)
    return [x.cpu() for x in (*outputs, *gradients(outputs, given, weights))]


def leaf(x: torch.Tensor, device: str) -> torch.Tensor:
    """As it lies in memory, on a device, to be differentiated."""
    moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return moved.copy_(x.detach()).requires_grad_()


def assert_case(
    tensors: dict[str, torch.Tensor], options: dict[str, Any], device: str, backend: str = "cuda"
) -> list[torch.Tensor]:
    ours = results(causal_conv1d, tensors, options, device, return_final_state=True, backend=backend)
    plain = results(causal_conv1d, tensors, options, "cpu", return_final_state=True, backend="reference")
    exact = results(oracle.conv, {name: oracle.cast(x, torch.float64) for name, x in tensors.items()}, options, "cpu")
    for name, x, reference, truth in zip(["out", "final state", *tensors], ours, plain, exact, strict=True):
        assert x.dtype == reference.dtype
        summed = tensors["x"].numel() // tensors["x"].shape[2] if name in {"weight", "bias"} else 0
        assert_close_to_float64(x, reference, truth, summed=summed, name=name)
    return ours


@pytest.fixture(scope="module", autouse=True)
def prepared(request: pytest.FixtureRequest) -> None:
    def want(case: str) -> list[Wanted]:
        some = tensors_of(CASES[case])
        return wanted_by(lambda: results(causal_conv1d, *some, "cpu", return_final_state=True, backend="cuda"), cuda)

    prepare_emulated(request, "test_agrees_with_float64", want)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, cuda)


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case: str) -> None:
    assert_case(*tensors_of(CASES[case]), "cpu")


@needs_gpu
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64_on_a_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    assert_case(*tensors_of(CASES[case]), "cuda")


def mixed() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Each tensor in another dtype, offsets of 32 bits, and gradients that are not contiguous."""
    tensors, options = arguments(lengths=PACK, channels=16, width=2, activation="silu")
    dtypes = {"x": torch.bfloat16, "weight": torch.float32, "bias": torch.float16, "initial_state": torch.float32}
    tensors = {name: x.detach().to(dtypes[name]) for name, x in tensors.items()}
    tensors["weight"] = tensors["weight"].T.contiguous().T
    tensors["initial_state"] = tensors["initial_state"].movedim(1, 0).contiguous().movedim(0, 1)
    return tensors, options | {"cu_seqlens": options["cu_seqlens"].int()}


@needs_emulator
@pytest.mark.usefixtures("emulated")
def test_dtypes_and_layouts() -> None:
    assert_case(*mixed(), "cpu")


@needs_gpu
def test_dtypes_and_layouts_on_a_gpu() -> None:
    assert_case(*mixed(), "cuda")


@needs_emulator
@pytest.mark.parametrize("layout", ["expanded", "length inside"])
def test_gradients_of_any_layout(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = arguments(length=63, **VECTORS)
    d_out = (
        torch.randn(2, 8, 63).transpose(1, 2) if layout == "length inside" else torch.randn(1, 1, 8).expand(2, 63, 8)
    )
    d_final = torch.randn(3, 2, 8).permute(1, 2, 0)

    def gradient(backend: str) -> tuple[torch.Tensor, ...]:
        outputs = causal_conv1d(**tensors, **options, return_final_state=True, backend=backend)
        return torch.autograd.grad(outputs, list(tensors.values()), (d_out, d_final))

    expected = gradient("reference")
    emulate(monkeypatch, cuda)
    for x, y in zip(gradient("cuda"), expected, strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-5)


@needs_emulator
def test_threads_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tensors_of(CASES["many runs"])
    runs = []
    for order in emulator.ORDERS:
        with monkeypatch.context() as patch:
            emulate(patch, cuda, order=order)
            runs.append(results(causal_conv1d, *case, "cpu", return_final_state=True, backend="cuda"))
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("reverse", [False, True])
def test_offsets_that_slip_through_never_leave_the_row(reverse: bool) -> None:
    """And every token gets a value."""
    tensors, _ = arguments(lengths=(20, 17), optional="b", **VECTORS)
    for offsets in ([5, 1000, -3], [37, 0, 37], [-9, -9, -9], [30, 20, 10]):
        bad = torch.tensor(offsets, dtype=torch.int32)
        out, final, _ = OPS.causal_conv1d(*tensors.values(), None, bad, "silu", reverse, True, False, "cuda")
        assert out.isfinite().all()
        assert final.shape == (2, 8, 3)


@needs_gpu
def test_the_backward_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    tensors, options = arguments(length=3000, channels=512, dtype=torch.bfloat16, activation="silu")
    given = {name: leaf(x, "cuda") for name, x in tensors.items()}
    d_out = torch.randn(2, 3000, 512).bfloat16().cuda()
    runs = [torch.autograd.grad(causal_conv1d(**given, **options), list(given.values()), d_out) for _ in range(20)]
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


def step_case(dtype: torch.dtype, width: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """A state whose slots lie apart in a wider buffer, and the other arguments."""
    state = torch.randn(6, 2, 5, width - 1).to(dtype)[:, 1]
    x, weight, bias = torch.randn(4, 10).to(dtype)[:, 5:], torch.randn(5, width), torch.randn(5).to(dtype)
    return state, {"x": x, "weight": weight, "bias": bias, "activation": "silu"}


def assert_steps(dtype: torch.dtype, width: int, slots: list[int] | None, device: str, backend: str = "cuda") -> None:
    state, given = step_case(dtype, width)
    indices = None if slots is None else torch.tensor(slots, dtype=torch.int32 if width > 2 else torch.int64)
    state = state[: len(given["x"])] if slots is None else state

    def stepped(backend: str, place: str, wide: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        def to(x: Any) -> Any:
            return x.to(place, wide if x.is_floating_point() else None) if isinstance(x, torch.Tensor) else x

        moved = torch.empty_strided(state.shape, state.stride(), dtype=wide or dtype, device=place).copy_(state)
        some = {name: to(x) for name, x in given.items()} | {"state_indices": None if indices is None else to(indices)}
        out = causal_conv1d_step(moved, **some, backend=backend)
        return out.cpu(), moved.cpu()

    plain, exact = stepped("reference", "cpu"), stepped("reference", "cpu", torch.float64)
    for x, reference, truth in zip(stepped(backend, device), plain, exact, strict=True):
        assert x.dtype == reference.dtype
        assert_close_to_float64(x, reference, truth)


def _noting_channels(kernel: Any, launched: list[int]) -> Any:
    def noting(source: Any, name: str, defines: nvrtc.Defines, *rest: Any, **more: Any) -> Any:
        launched.append(int(dict(defines)["CHANNELS"]))
        return kernel(source, name, defines, *rest, **more)

    return noting


STEPS = [(torch.float32, 4, None), (torch.bfloat16, 4, [3, -1, 0, 5]), (torch.float16, 2, [3, -1, 0, 5]),
         (torch.float32, 1, None)]  # fmt: skip


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("dtype", "width", "slots"), STEPS)
def test_steps(dtype: torch.dtype, width: int, slots: list[int] | None) -> None:
    assert_steps(dtype, width, slots, "cpu")


@needs_gpu
@pytest.mark.parametrize(("dtype", "width", "slots"), STEPS)
def test_steps_on_a_gpu(dtype: torch.dtype, width: int, slots: list[int] | None) -> None:
    assert_steps(dtype, width, slots, "cuda")


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("width", [1, 2, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_many_channels_read_vectors(dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LEAST_FOR_VECTORS", 0)
    launched: list[int] = []
    monkeypatch.setattr(nvrtc, "kernel", _noting_channels(nvrtc.kernel, launched))
    state, x = torch.randn(6, 2, 24, width - 1).to(dtype)[:, 1], torch.randn(4, 48).to(dtype)[:, 24:]
    rest = (torch.randn(24, width).to(dtype), torch.randn(24).to(dtype), "silu", False)
    indices = torch.tensor([3, -1, 0, 5])

    def stepped(backend: str, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        given = [one.to(wide) if isinstance(one, torch.Tensor) else one for one in rest]
        moved = torch.empty_strided(state.shape, state.stride(), dtype=wide).copy_(state)
        taken = torch.empty_strided(x.shape, x.stride(), dtype=wide).copy_(x)
        return OPS.causal_conv1d_step(moved, taken, *given, indices, backend), moved

    plain, exact = stepped("reference", dtype), stepped("reference", torch.float64)
    for actual, reference, truth in zip(stepped("cuda", dtype), plain, exact, strict=True):
        assert_close_to_float64(actual, reference, truth)
    assert launched == [cuda.STEP_CHANNELS]


@needs_emulator
@pytest.mark.usefixtures("emulated")
def test_slots_that_slip_through_never_leave_the_state() -> None:
    state, given = step_case(torch.float32, 4)
    before = state.clone()
    rest = (None, "silu", False, torch.tensor([99, -1, -2, -3]), "cuda")
    out = OPS.causal_conv1d_step(state, given["x"], given["weight"], *rest)
    assert out[0].isfinite().all()
    assert out[1:].eq(0).all()
    assert torch.equal(state[:5], before[:5])


@needs_gpu
def test_steps_can_be_captured() -> None:
    state, given = step_case(torch.bfloat16, 4)
    some = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    indices = torch.tensor([3, -1, 0, 5]).cuda()
    captured, eager = state.cuda().contiguous(), state.cuda().contiguous()
    causal_conv1d_step(eager, **some, state_indices=indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = causal_conv1d_step(captured, **some, state_indices=indices)
    graph.replay()
    expected = causal_conv1d_step(state.cuda().contiguous(), **some, state_indices=indices)
    assert torch.equal(out, expected)
    assert torch.equal(captured, eager)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("width", [1, 4, 9, 40])
@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 4096, 2048), (1, 2**20, 1), (64, 7, 24), (1, 2**21, 2048)])
def test_plans_cover_everything(shape: tuple[int, int, int], width: int, backward: bool) -> None:
    batch, length, channels = shape
    for itemsize, aligned in ((2, channels % 8 == 0), (4, channels % 4 == 0), (2, False)):
        chosen = plan(batch, length, channels, width, itemsize, aligned, backward)
        assert chosen.channels * itemsize <= 16 if aligned else chosen.channels == 1
        assert THREADS % chosen.lanes == 0
        assert 0 <= chosen.columns * chosen.lanes * chosen.channels - channels < chosen.lanes * chosen.channels
        assert (
            0 <= chosen.tiles * chosen.run * (THREADS // chosen.lanes) - length < chosen.run * THREADS // chosen.lanes
        )
        assert chosen.columns * chosen.tiles * batch < 2**31
        assert 1 <= chosen.unroll <= 8
