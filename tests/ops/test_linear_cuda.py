"""The linear map's CUDA kernels against float64: in the emulator everywhere, and on a GPU where there is one."""

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
from selective_ssm.ops.linear import tiling as tilings
from selective_ssm.ops.linear.plan import STEP_BYTES, TILE, overridden, plan
from selective_ssm.ops.linear.tiling import tiling
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


MANY = [(17, 80, 48), (31, 130, 56), (64, 24, 128), (128, 130, 200), (33, 40, 808)]
"""(M, N, K)."""
TILINGS: list[dict[str, Any]] = [
    {"vectors": 32, "rows": 24, "depth": 64, "stages": 3, "teams": 2, "split": 2},
    {"vectors": 64, "rows": 16, "depth": 128, "stages": 2, "teams": 1, "split": 4},
    {"vectors": 16, "rows": 48, "depth": 64, "stages": 8, "teams": 1, "split": 1},
]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, cuda)


@pytest.fixture
def tiled(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows a weight has, more than sixteen vectors are served by many.cu."""
    monkeypatch.setattr(cuda, "_SMALL", 0)


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


@needs_emulator
@pytest.mark.usefixtures("emulated")
def test_a_small_weight_serves_any_number_of_vectors() -> None:
    x, weight, bias = drawn(64, 1536, 80, BF16)
    out = cuda.forward(x, weight, bias)
    assert_exact(out, x, weight, bias)
    for some in (slice(17), slice(31, 64)):
        assert cuda.forward(x[some], weight, bias).equal(out[some])


@needs_emulator
@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("case", MANY)
def test_many_vectors_agree_with_float64(case: tuple[int, int, int]) -> None:
    rows, outputs, inputs = case
    assert_case(rows, (outputs, inputs), BF16, "cpu")


@needs_emulator
@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("layout", TILINGS)
def test_any_tiling_agrees_with_float64(layout: dict[str, Any]) -> None:
    with tilings.overridden(**layout):
        for rows, outputs, inputs in ((17, 80, 48), (31, 24, 128), (70, 130, 56), (128, 24, 200)):
            assert_case(rows, (outputs, inputs), FP16, "cpu")


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("size", [*SIZES, (3072, 768), (80, 1536), (1536, 48), (50280, 768), (2048, 4096)])
def test_agrees_with_float64_on_a_gpu(
    size: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    for rows in (*counts(dtype), *(() if dtype == FP32 else (17, 50, 128))):
        assert_case(rows, size, dtype, "cuda")


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_vector_alone_gives_the_same_bits(dtype: torch.dtype) -> None:
    most = counts(dtype)[-1]
    x, weight, bias = drawn(most, 808, 19, dtype)
    expected = cuda.forward(x, weight, bias)
    for count in (1, 2, 8):
        assert cuda.forward(x[:count], weight, bias).equal(expected[:count])
    assert cuda.forward(x[most - 1 :], weight, bias).equal(expected[most - 1 :])


@needs_emulator
@pytest.mark.usefixtures("tiled")
def test_a_vector_among_others_gives_the_same_bits() -> None:
    x, weight, bias = drawn(100, 328, 40, BF16)
    expected = cuda.forward(x, weight, bias)
    for some in (slice(17), slice(60, 100)):
        assert cuda.forward(x[some], weight, bias).equal(expected[some])


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
@pytest.mark.usefixtures("tiled")
def test_many_vectors_are_read_from_views_and_nothing_beside_them() -> None:
    guards = Guards()
    x, weight, bias = drawn(21, 48, 26, BF16)
    expected = cuda.forward(x, weight, bias)
    wide = guards.buffer((26, 48), (64, 1), BF16, "cpu").copy_(weight)
    part = guards.buffer((21, 80), (80, 1), BF16, "cpu")[:, :48].copy_(x)
    assert cuda.forward(part, wide, bias).equal(expected)
    fenced = (emulator.fenced(one) for one in (part, weight, bias))
    assert cuda.forward(*fenced).equal(expected)
    assert guards.intact()


@needs_emulator
@pytest.mark.usefixtures("tiled")
def test_what_is_not_a_number_goes_its_way_among_many() -> None:
    x, weight, _ = drawn(20, 56, 20, BF16)
    x[0], x[18, 0] = 1, torch.nan
    weight[3, 55], weight[5, :2] = torch.nan, torch.tensor([torch.inf, -torch.inf])
    out = cuda.forward(x, weight, None)
    assert out.isfinite().equal(F.linear(x, weight).isfinite())
    assert out[0].isnan().nonzero().flatten().tolist() == [3, 5]


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
@pytest.mark.parametrize("vectors", [9, 40])
def test_threads_may_run_in_any_order(vectors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_SMALL", 0)
    x, weight, bias = drawn(vectors, 600, 40, BF16)
    runs: list[Tensor] = []
    for order in emulator.ORDERS:
        with monkeypatch.context() as patch:
            emulate(patch, cuda, order=order)
            runs.append(cuda.forward(x, weight, bias))
    assert all(run.equal(runs[0]) for run in runs[1:])


def served(call: Callable[[], Any]) -> bool:
    """Whether the kernel is launched."""
    return len(wanted_by(call, cuda)) == 1


def test_the_kernels_serve_few_vectors_of_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = drawn(129, 48, 24, BF16)
    large = torch.ones(600, 48, dtype=BF16)
    monkeypatch.setattr(cuda, "_LARGE", large.numel() - 1)
    assert served(lambda: linear(x[:128], weight, bias))
    assert served(lambda: linear(x[0], weight))
    assert served(lambda: linear(x[:8].float(), weight.float()))
    assert served(lambda: linear(x.half()[:16], weight.half()))
    assert served(lambda: linear(x[:16], large))
    assert served(lambda: linear(x[:17], large[:300]))
    for outside in (
        lambda: linear(x, weight),
        lambda: linear(x[:17], large),
        lambda: linear(x[:17, 1:41], large[:300, :40]),
        lambda: linear(x[:9].float(), weight.float()),
        lambda: linear(x[:1].double(), weight.double()),
        lambda: linear(x[:1], weight[:0]),
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
@pytest.mark.parametrize(("vectors", "itemsize"), [(1, 2), (16, 2), (100, 2), (1, 4)])
def test_plans_fit(vectors: int, outputs: int, inputs: int, itemsize: int) -> None:
    chosen, steps = plan(vectors, outputs, inputs, itemsize), -(-inputs * itemsize // STEP_BYTES)
    for others in (1, 16) if vectors <= 16 else (17, 64, 128):
        split = plan(others, outputs, inputs, itemsize).split
        assert chosen.split == split, "or bits would depend on the number of vectors"
    assert chosen.threads <= 512
    assert chosen.ahead * chosen.tiles <= 8, "vectors in a thread's registers"
    assert chosen.ahead * chosen.split < steps + chosen.split, "nobody sends for what there is not"
    assert chosen.split <= steps
    assert chosen.groups == 1 or outputs > 64 * chosen.rows
    assert chosen.rows == TILE * chosen.tiles * chosen.groups


@pytest.mark.parametrize("outputs", [257, 768, 3072, 8192, 16384])
@pytest.mark.parametrize("inputs", [8, 48, 1536, 9999])
def test_tilings_fit(outputs: int, inputs: int) -> None:
    for vectors in (17, 32, 64, 100, 128):
        chosen = tiling(vectors, outputs, inputs)
        assert chosen.split == tiling(128, outputs, inputs).split, "or bits would depend on the number of vectors"
        assert chosen.depth % (32 * chosen.split) == 0
        assert chosen.vectors % (16 * chosen.teams) == 0
        assert chosen.threads <= 256
        assert chosen.vectors // chosen.teams * chosen.rows <= 32 * 128, "sums in a thread's registers"
        assert chosen.shared <= 112 * 1024, "two blocks fit a multiprocessor"


@needs_gpu
@pytest.mark.parametrize("vectors", [4, 100])
def test_overlapping_changes_no_bit(vectors: int) -> None:
    """Each product reads what the one before it writes."""
    weights = [torch.randn(512, 512, device="cuda").to(BF16) / 20 for _ in range(40)]
    x = torch.randn(vectors, 512, device="cuda").to(BF16)

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
