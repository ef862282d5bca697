"""The linear map for few vectors, against float64 and with each instruction set, and where torch's own runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from selective_ssm.layers.linear import Linear
from selective_ssm.ops import linear, native
from selective_ssm.ops.linear import cpu
from tests.ops.guards import Guards
from tests.ops.launches import poison
from tests.tolerance import assert_close_to_float64

needs_library = pytest.mark.skipif(native.explain() is not None, reason=str(native.explain()))
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the kernel has been called with."""
    seen: list[Tensor] = []
    forward = cpu.forward

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(x)
        return forward(x, weight, bias)

    monkeypatch.setattr(cpu, "forward", spy)
    return seen


def drawn(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(inputs)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight, bias


def assert_exact(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert actual.dtype == x.dtype
    assert_close_to_float64(actual, F.linear(x, weight, bias), exact)


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1, 1), (3, 40), (15, 16), (16, 15), (33, 17), (48, 100), (100, 47), (768, 80)]
)
def test_agrees_with_float64(inputs: int, outputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    for rows in range(1, cpu.MOST_VECTORS + 1):
        x, weight, bias = drawn(rows, inputs, outputs, dtype)
        assert_exact(cpu.forward(x, weight, bias), x, weight, bias)
        assert_exact(cpu.forward(x, weight, None), x, weight, None)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_views_and_nothing_beside_them(dtype: torch.dtype) -> None:
    guards = Guards()
    x, weight, bias = drawn(3, 50, 21, dtype)
    x, weight = guards.buffer((3, 50), (77, 1), dtype, "cpu").copy_(x), guards.copy(weight, "cpu")
    wide = guards.buffer((21, 50), (61, 1), dtype, "cpu").copy_(weight)
    expected = cpu.forward(x.contiguous(), weight, bias)
    assert cpu.forward(x, weight, bias).equal(expected)
    assert cpu.forward(x, wide, guards.copy(bias, "cpu")).equal(expected)
    assert linear(x.t().contiguous().t(), weight, bias).equal(expected), "any strides"
    assert linear(x[:, None], weight, bias).equal(expected[:, None]), "any axes"
    assert linear(x[0], weight, bias).equal(expected[0])
    assert guards.intact()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector_alone_and_any_number_of_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    x, weight, bias = drawn(8, 700, 1001, dtype)
    assert weight.numel() >= cpu.LEAST_FOR_THREADS
    torch.set_num_threads(1)
    expected = cpu.forward(x, weight, bias)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert cpu.forward(x, weight, bias).equal(expected)
    for row in range(8):
        assert cpu.forward(x[row : row + 1], weight, bias).equal(expected[row : row + 1])


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_goes_its_way(dtype: torch.dtype) -> None:
    x, weight, _ = drawn(2, 37, 40, dtype)
    weight[3, 36], weight[5, 0], weight[5, 1] = torch.nan, torch.inf, -torch.inf
    weight[7, 2] = torch.inf
    x[0, :3] = 1
    expected, out = F.linear(x, weight), cpu.forward(x, weight, None)
    assert out[0].isnan().nonzero().flatten().tolist() == [3, 5]
    assert out[0, 7] == torch.inf
    assert out.isfinite().equal(expected.isfinite())


@needs_library
@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own, where it differentiates forward
def test_the_kernel_serves_few_vectors_without_a_gradient(calls: list[Tensor]) -> None:
    x, weight, bias = drawn(9, 20, 30, torch.float32)
    layer = Linear(20, 30)
    for outside in (
        lambda: linear(x, weight),
        lambda: linear(x[:8].double(), weight.double()),
        lambda: linear(x[:8].half(), weight.half()),
        lambda: layer(x[:1]),
        lambda: linear(x[:0], weight),
        lambda: torch.func.grad(lambda one: linear(one, weight).sum())(x[:1]),
        lambda: torch.compile(linear, backend="eager", fullgraph=True)(x[:1], weight),
    ):
        outside()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x[:1], weight).dtype == torch.bfloat16
    with forward_ad.dual_level():
        out = linear(forward_ad.make_dual(x[:1], x[1:2]), weight)
        assert forward_ad.unpack_dual(out).tangent is not None
    assert not calls
    linear(x[:8], weight, bias)
    with torch.no_grad():
        layer(x[:1])
        torch.vmap(lambda one: linear(one, weight))(x[:2])
    assert len(calls) >= 3


@needs_library
def test_the_reference_can_be_asked_for(calls: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELECTIVE_SSM_BACKEND", "reference")
    x, weight, bias = drawn(2, 20, 30, torch.float32)
    assert linear(x, weight, bias).equal(F.linear(x, weight, bias))
    assert not calls


def test_without_the_library_torch_serves(library_is: Callable[[Path | None], None]) -> None:
    library_is(None)
    x, weight, bias = drawn(2, 20, 30, torch.float32)
    assert linear(x, weight, bias).equal(F.linear(x, weight, bias))


@needs_library
def test_registered_as_torch_wants_it() -> None:
    x, weight, bias = drawn(2, 20, 30, torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.selective_ssm.linear.default, (x, weight, bias, "cpu"), test_utils=tests)


def test_the_layer_is_torchs_to_all_who_ask() -> None:
    layer = Linear(5, 3)
    twin = torch.nn.Linear(5, 3)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(4, 5, requires_grad=True)
    for one in (layer, copy.deepcopy(layer)):
        out = one(x)
        assert out.equal(twin(x))
        out.sum().backward()
    assert x.grad is not None
