"""The linear map's CUDA kernel against float64: in the emulator everywhere, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.ops import linear, nvrtc
from selective_ssm.ops.driver import overlapping
from selective_ssm.ops.linear import cuda
from selective_ssm.ops.linear.plan import STEP_BYTES, TILE, overridden, plan
from tests.ops import emulator
from tests.ops.guards import Guards
from tests.ops.launches import emulate, poison
from tests.ops.test_linear import assert_exact, drawn
from tests.ops.wanted import wanted_by

needs_emulator = pytest.mark.skipif(emulator.explain() is not None, reason=str(emulator.explain()))
needs_gpu = pytest.mark.skipif(nvrtc.explain() is not None, reason=str(nvrtc.explain()))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = [(1, 8), (7, 48), (80, 56), (130, 96), (8, 768), (40, 1000)]
"""(N, K)."""
LAYOUTS: list[dict[str, Any]] = [
    {"tiles": 2, "ahead": 2, "split": 1, "groups": 4},
    {"tiles": 1, "ahead": 3, "split": 2, "groups": 2},
    {"tiles": 2, "ahead": 1, "split": 8, "groups": 1},
]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, cuda)


def assert_case(rows: int, size: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    outputs, inputs = size
    x, weight, bias = (one.to(device) for one in drawn(rows, inputs, outputs, dtype))
    assert_exact(cuda.forward(x, weight, bias), x, weight, bias)
    assert_exact(cuda.forward(x, weight, None), x, weight, None)


def counts(dtype: torch.dtype) -> tuple[int, ...]:
    """Of vectors."""
    return (1, 3, 8) if dtype == FP32 else (1, 8, 9, 16)


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_float64(size: tuple[int, int], dtype: torch.dtype) -> None:
    for rows in counts(dtype):
        assert_case(rows, size, dtype, "cpu")


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_agrees_with_float64(layout: dict[str, Any], dtype: torch.dtype) -> None:
    with overridden(**layout):
        for size in ((130, 96), (33, 744)):
            assert_case(5, size, dtype, "cpu")


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("size", [*SIZES, (3072, 768), (80, 1536), (1536, 48), (50280, 768), (2048, 4096)])
def test_agrees_with_float64_on_a_gpu(
    size: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    for rows in counts(dtype):
        assert_case(rows, size, dtype, "cuda")


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_vector_alone_gives_the_same_bits(dtype: torch.dtype) -> None:
    most = cuda.MOST_VECTORS[dtype]
    x, weight, bias = drawn(most, 808, 19, dtype)
    expected = cuda.forward(x, weight, bias)
    for count in (1, 2, 8):
        assert cuda.forward(x[:count], weight, bias).equal(expected[:count])
    assert cuda.forward(x[most - 1 :], weight, bias).equal(expected[most - 1 :])


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_reads_views_and_nothing_beside_them(dtype: torch.dtype) -> None:
    guards = Guards()
    x, weight, bias = drawn(3, 48, 21, dtype)
    expected = cuda.forward(x, weight, bias)
    wide = guards.buffer((21, 48), (64, 1), dtype, "cpu").copy_(weight)
    part = guards.buffer((3, 80), (80, 1), dtype, "cpu")[:, :48].copy_(x)
    for offset, stride in ((1, 80), (8, 79)):
        odd = guards.buffer((3, 48 + offset), (stride, 1), dtype, "cpu")[:, offset:].copy_(x)
        assert cuda.forward(odd, weight, bias).equal(expected), "x out of alignment"
    assert linear(part, guards.copy(weight, "cpu"), guards.copy(bias, "cpu")).equal(expected)
    assert linear(part, wide, bias.repeat_interleave(2)[::2]).equal(expected)
    assert linear(x.t().contiguous().t(), weight, bias).equal(expected), "any strides"
    assert linear(x[:, None], weight, bias).equal(expected[:, None]), "any axes"
    fenced = (emulator.fenced(one) for one in (part[:, 40:], weight[:, 40:].contiguous(), bias))
    assert cuda.forward(*fenced).equal(cuda.forward(x[:, 40:], weight[:, 40:].contiguous(), bias))
    assert guards.intact()


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_what_is_not_a_number_goes_its_way(dtype: torch.dtype) -> None:
    x, weight, _ = drawn(4, 56, 20, dtype)
    x[0], x[2, 0] = 1, torch.nan
    weight[3, 55], weight[5, :2] = torch.nan, torch.tensor([torch.inf, -torch.inf])
    weight[7, 2] = torch.inf
    out = cuda.forward(x, weight, None)
    assert out.isfinite().equal(F.linear(x, weight).isfinite())
    assert out[2].isnan().all()
    assert out[0].isnan().nonzero().flatten().tolist() == [3, 5]
    assert out[0, 7] == torch.inf


@needs_emulator
def test_threads_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = drawn(9, 600, 40, BF16)
    runs: list[Tensor] = []
    for order in emulator.ORDERS:
        with monkeypatch.context() as patch:
            emulate(patch, cuda, order=order)
            runs.append(cuda.forward(x, weight, bias))
    assert all(run.equal(runs[0]) for run in runs[1:])


def served(call: Callable[[], Any]) -> bool:
    """Whether the kernel is launched."""
    return len(wanted_by(call, cuda)) == 1


def test_the_kernel_serves_few_vectors_of_whole_rows() -> None:
    x, weight, bias = drawn(17, 48, 24, BF16)
    assert served(lambda: linear(x[:16], weight, bias))
    assert served(lambda: linear(x[0], weight))
    assert served(lambda: linear(x[:8].float(), weight.float()))
    assert served(lambda: linear(x.half()[:16], weight.half()))
    for outside in (
        lambda: linear(x, weight),
        lambda: linear(x[:9].float(), weight.float()),
        lambda: linear(x[:1].double(), weight.double()),
        lambda: linear(x[:1, :44], weight[:, :44]),
        lambda: linear(x[:1, :40], weight[:, 4:44]),
        lambda: linear(x[:1, 1:41], weight[:, :40].clone().as_strided((20, 40), (44, 1))),
        lambda: linear(x[:1], weight.clone().requires_grad_()),
    ):
        assert not served(outside)
    assert not cuda.takes(x[:1], weight, bias.float())
    with torch.autocast("cpu", BF16):
        assert not served(lambda: linear(x[:1], weight))


@pytest.mark.parametrize("outputs", [1, 80, 768, 3072, 50280, 10**6])
@pytest.mark.parametrize("inputs", [8, 48, 1536, 9999])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_plans_fit(outputs: int, inputs: int, itemsize: int) -> None:
    chosen, steps = plan(outputs, inputs, itemsize), -(-inputs * itemsize // STEP_BYTES)
    assert chosen.threads <= 512
    assert chosen.ahead * chosen.tiles <= 8, "vectors in a thread's registers"
    assert chosen.ahead * chosen.split < steps + chosen.split, "nobody sends for what there is not"
    assert chosen.split == 1 or steps > chosen.split
    assert chosen.groups == 1 or outputs >= 128 * chosen.rows
    assert chosen.rows == TILE * chosen.tiles * chosen.groups


@needs_gpu
def test_overlapping_changes_no_bit() -> None:
    """Each product reads what the one before it writes."""
    weights = [torch.randn(512, 512, device="cuda").to(BF16) / 20 for _ in range(40)]
    x = torch.randn(4, 512, device="cuda").to(BF16)

    def chain() -> Tensor:
        y = x
        for weight in weights:
            y = linear(y, weight)
        return y

    with torch.no_grad():
        expected = chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), overlapping():
            out = chain()
        for _ in range(20):
            out.zero_()
            graph.replay()
            assert out.equal(expected)
        with overlapping():
            assert chain().equal(expected)
