"""The fused add and norm: against float64, in every mixture of dtypes, and as one of torch's operators."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from selective_ssm.errors import MissingPackage
from selective_ssm.ops import add_rms_norm, native, nvrtc
from selective_ssm.ops.add_rms_norm import cpu, cuda, reference
from selective_ssm.ops.add_rms_norm.op import Backend
from tests.ops import emulator
from tests.ops.launches import emulate
from tests.tolerance import assert_close_to_float64

OPS = torch.ops.selective_ssm
EPS = 1e-5
LOW, SINGLE = torch.bfloat16, torch.float32


def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return weight * total / (total.square().mean(-1, keepdim=True) + EPS).sqrt(), total


def inputs(x: torch.dtype, residual: torch.dtype, weight: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    made = (torch.randn(*shape).to(x), torch.randn(*shape).to(residual), torch.randn(shape[-1]).to(weight))
    return tuple(one.requires_grad_() for one in made)


@pytest.mark.parametrize("shape", [(7,), (2, 0, 8), (3, 5, 48)])
def test_values_and_gradients(shape: tuple[int, ...]) -> None:
    leaves = inputs(*[torch.float64] * 3, *shape)
    results = [function(*leaves) for function in (lambda *given: add_rms_norm(*given, EPS), plain)]
    directions = [torch.randn_like(one) for one in results[0]]
    gradients = [torch.autograd.grad(result, leaves, directions) for result in results]
    for actual, expected in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_of_either_result_alone(used: int) -> None:
    leaves = inputs(*[torch.float64] * 3, 3, 6)
    wanted = torch.autograd.grad(plain(*leaves)[used].sin().sum(), leaves, allow_unused=True, materialize_grads=True)
    gradients = torch.autograd.grad(add_rms_norm(*leaves, EPS)[used].sin().sum(), leaves)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("dtypes", [(LOW, SINGLE, LOW), (LOW, LOW, LOW), (LOW, SINGLE, SINGLE), (SINGLE,) * 3])
def test_dtypes(dtypes: tuple[torch.dtype, ...]) -> None:
    leaves = inputs(*dtypes, 4, 64)
    y, total = add_rms_norm(*leaves, EPS)
    assert (y.dtype, total.dtype) == (dtypes[2], dtypes[1])
    assert torch.equal(total, (leaves[0].double() + leaves[1].double()).float().to(total.dtype))
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = plain(*wide)[0]
    torch.testing.assert_close(y.double(), exact, rtol=2**-7 if LOW in dtypes else 1e-6, atol=1e-6)
    direction = torch.randn(4, 64, dtype=torch.float64)
    wanted = torch.autograd.grad(exact, wide, direction.to(y.dtype).double())
    for gradient, want, leaf in zip(torch.autograd.grad(y, leaves, direction.to(y.dtype)), wanted, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        low = LOW in (leaf.dtype, dtypes[1])  # a stream of low precision rounds the sum that is normalised
        error = (gradient.double() - want).abs().max() / want.abs().max()
        assert error < (2**-7 if low else 1e-5)


def test_autocast_says_what_the_next_product_reads() -> None:
    leaves = inputs(LOW, SINGLE, SINGLE, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, total = add_rms_norm(*leaves, EPS)
    assert (y.dtype, total.dtype) == (LOW, SINGLE)
    assert torch.equal(y, add_rms_norm(*leaves, EPS)[0].to(LOW))


@pytest.mark.parametrize("dtypes", [(LOW, SINGLE, LOW), (SINGLE,) * 3])
def test_opcheck(dtypes: tuple[torch.dtype, ...]) -> None:
    torch.library.opcheck(OPS.add_rms_norm, (*inputs(*dtypes, 2, 5, 8), EPS, dtypes[2], None))
    no_columns = torch.randn(2, 5, 16).to(dtypes[0])[..., ::2], *inputs(*dtypes, 2, 5, 8)[1:]
    torch.library.opcheck(OPS.add_rms_norm, (*no_columns, EPS, dtypes[2], None))


def test_it_is_not_differentiated_twice() -> None:
    leaves = inputs(*[SINGLE] * 3, 2, 4)
    (gradient,) = torch.autograd.grad(add_rms_norm(*leaves, EPS)[0].sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


def test_what_does_not_fit_is_refused() -> None:
    row, weight = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\) for x \(2, 4\)"):
        add_rms_norm(row, row, weight[:3], EPS)
    with pytest.raises(ValueError, match=r"residual has shape \(4,\); expected that of x, \(2, 4\)"):
        add_rms_norm(row, row[0], weight, EPS)
    with pytest.raises(TypeError, match="residual has dtype float64; expected float32"):
        add_rms_norm(row, row.double(), weight, EPS)
    with pytest.raises(ValueError, match="weight is on meta"):
        add_rms_norm(row, row, weight.to("meta"), EPS)


KERNEL_CASES = [(LOW, SINGLE, LOW, 264), (SINGLE, SINGLE, SINGLE, 4100), (LOW, LOW, SINGLE, 5)]
WIDTHS = (1, 7, 8, 63, 64, 65, 100, 128, 200, 255, 256, 264)  # around where lanes double, and blocks are one row


def hold_against_float64(
    x_dtype: torch.dtype,
    stream: torch.dtype,
    weight_dtype: torch.dtype,
    width: int,
    device: str = "cpu",
    *,
    backend: Backend = cuda,
    rows: int = 7,
) -> list[Tensor]:
    """Everything that the kernels compute, after it was held against the reference in float64."""
    x, residual, weight = (one.detach().to(device) for one in inputs(x_dtype, stream, weight_dtype, rows, width))
    d_y, d_total = torch.randn(rows, width).to(device, weight_dtype), torch.randn(rows, width).to(device, stream)

    def both(backend: Backend, *tensors: Tensor) -> list[Tensor]:
        x, residual, weight, d_y, d_total = tensors
        y, total = backend.forward(x, residual, weight, EPS, weight.dtype)
        found = [y, total]
        for above in (d_total, None):
            d_residual, d_x, d_weight = backend.backward(d_y, above, total, weight, EPS, x.dtype)
            found += [d_residual, d_residual if d_x is None else d_x, d_weight]
        return found

    tensors = (x, residual, weight, d_y, d_total)
    found, wanted = both(backend, *tensors), both(reference, *tensors)
    exact = both(reference, *(one.double() for one in tensors))
    for index, (actual, expected, truth) in enumerate(zip(found, wanted, exact, strict=True)):
        assert actual.dtype == expected.dtype
        assert_close_to_float64(actual, expected, truth, summed=rows if index in (4, 7) else 0, name=str(index))
    return found


@pytest.mark.skipif(emulator.explain() is not None, reason=str(emulator.explain()))
@pytest.mark.parametrize("case", KERNEL_CASES)
@pytest.mark.parametrize("order", emulator.ORDERS)
def test_the_kernel_thread_by_thread(
    case: tuple[object, ...], order: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, cuda, order=order)
    monkeypatch.setattr(cuda, "_multiprocessors", lambda _: 1)
    hold_against_float64(*case)


@pytest.mark.skipif(emulator.explain() is not None, reason=str(emulator.explain()))
@pytest.mark.parametrize("width", [1, 64, 100, 255])
def test_rows_that_share_a_block_thread_by_thread(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, cuda)
    monkeypatch.setattr(cuda, "_multiprocessors", lambda _: 1)
    hold_narrow_rows(width, "cpu", (3, 70))


@pytest.mark.skipif(nvrtc.explain() is not None, reason=str(nvrtc.explain()))
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_that_share_a_block(width: int) -> None:
    hold_narrow_rows(width, "cuda", (1, 3, 1000))
    hold_against_float64(SINGLE, SINGLE, SINGLE, width, "cuda", rows=100_003)


def hold_narrow_rows(width: int, device: str, rows: tuple[int, ...]) -> None:
    """Exact for any number of rows; and no row knows how many others there are, nor d weight of those that are not."""
    for count in rows if width > 1 else rows[-1:]:  # in few rows of one column no gradient is more than rounding leaves
        hold_against_float64(LOW, SINGLE, LOW, width, device, rows=count)
    x, residual, weight = (one.detach().to(device) for one in inputs(LOW, SINGLE, LOW, rows[-1], width))
    y, total = cuda.forward(x, residual, weight, 0.0, LOW)
    d_residual, d_x, d_weight = cuda.backward(y, total, total, weight, 0.0, LOW)
    assert d_x is not None
    assert d_weight.isfinite().all()
    few = cuda.forward(x[:2], residual[:2], weight, 0.0, LOW)
    few += cuda.backward(y[:2], total[:2], total[:2], weight, 0.0, LOW)[:2]
    assert all(torch.equal(a, b[:2]) for a, b in zip(few, (y, total, d_residual, d_x), strict=True))


@pytest.mark.skipif(nvrtc.explain() is not None, reason=str(nvrtc.explain()))
@pytest.mark.parametrize("case", [*KERNEL_CASES, (LOW, SINGLE, LOW, 2048), (torch.float16, SINGLE, SINGLE, 8192)])
def test_the_kernel(case: tuple[object, ...]) -> None:
    hold_against_float64(*case, "cuda")
    x, residual, weight = (one.cuda() for one in inputs(*case[:3], 600, case[3]))
    y, total = reference.forward(x, residual, weight, EPS, weight.dtype)
    gradients = [cuda.backward(y, total, total, weight, EPS, x.dtype) for _ in range(20)]
    assert all(torch.equal(a[2], gradients[0][2]) and torch.equal(a[0], gradients[0][0]) for a in gradients)


needs_library = pytest.mark.skipif(native.explain() is not None, reason=str(native.explain()))


@needs_library
@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("rows", [1, 33, 1000])
@pytest.mark.parametrize(
    "case", [*itertools.product((LOW, SINGLE), (LOW, SINGLE), (LOW, SINGLE), (40,)), (torch.float16, SINGLE, SINGLE, 7)]
)
def test_the_cpu_kernel(case: tuple[Any, ...], rows: int) -> None:
    hold_against_float64(*case, backend=cpu, rows=rows)


@needs_library
def test_threads_change_no_bit_and_what_is_no_number_stays_in_its_row() -> None:
    x, residual, weight = (one.detach() for one in inputs(SINGLE, SINGLE, SINGLE, 300, 768))
    x[7, 3], residual[8, 700] = torch.nan, torch.inf
    found: list[list[Tensor]] = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, total = cpu.forward(x, residual, weight, EPS, SINGLE)
            d_residual, d_x, d_weight = cpu.backward(x, residual, total, weight, EPS, SINGLE)
            assert d_x is None
            found.append([y, total, d_residual, d_weight])
    finally:
        torch.set_num_threads(1)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    y, total = found[0][:2]
    assert y.isnan().any(1).nonzero().flatten().tolist() == [7, 8]
    assert total[8, 700] == torch.inf


@needs_library
def test_the_cpu_kernel_serves_the_operator() -> None:
    leaves = inputs(LOW, SINGLE, LOW, 3, 5, 20)
    given = [add_rms_norm(*leaves, EPS, backend=name) for name in ("cpu", None)]
    assert all(a.equal(b) for a, b in zip(*given, strict=True))
    torch.library.opcheck(OPS.add_rms_norm, (*leaves, EPS, LOW, "cpu"))


def test_the_source_compiles() -> None:
    shape = cuda.Shape(LOW, SINGLE, LOW, LOW, 2048, True)
    try:
        assert nvrtc.compile(cuda.SOURCE, dict(shape.defines), "sm_90")
    except MissingPackage as absent:
        pytest.skip(str(absent))
