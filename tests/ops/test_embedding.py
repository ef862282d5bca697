"""The gradient of few rows is torch's, however many tokens there are and whatever else uses the weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.layers.embedding import Embedding
from selective_ssm.models import LanguageModel, LanguageModelConfig
from selective_ssm.ops.embedding import CHUNK, MOST_ROWS, _Rows, embedding

Rows = Callable[[Tensor, Tensor], Tensor]


def table(rows: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, width).to(dtype).requires_grad_()


def gradient(of: Rows, ids: Tensor, weight: Tensor, d_y: Tensor) -> Tensor:
    return torch.autograd.grad(of(ids, weight), weight, d_y)[0]


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, CHUNK), (3, 5, 211)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rows", [1, 16])
def test_values_and_gradient(rows: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight, ids = table(rows, 6), torch.randint(rows, shape, dtype=dtype)
    d_y = torch.randn(6, *shape, dtype=torch.float64).movedim(0, -1)
    assert torch.equal(_Rows.apply(ids, weight), F.embedding(ids, weight))
    found, wanted = (gradient(of, ids, weight, d_y) for of in (_Rows.apply, F.embedding))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_it_is_a_function_to_torch_func() -> None:
    weight, ids = table(3, 4).detach(), torch.tensor([0, 2, 2])
    found = torch.func.grad(lambda weight: _Rows.apply(ids, weight).sum())(weight)
    assert found[:, 0].tolist() == [1, 0, 2]


def assert_rounded_once(of: Rows, dtype: torch.dtype, rows: int = 16, device: str = "cpu") -> None:
    """No less exact than torch's, and but for the last rounding as exact as sums in fp32; under autocast too."""
    weight, ids = table(rows, 64, dtype).detach().to(device).requires_grad_(), torch.randint(rows, (40_000,)).to(device)
    d_y = torch.randn(40_000, 64).to(device, dtype)
    exact = gradient(F.embedding, ids, weight.detach().double().requires_grad_(), d_y.double())
    with torch.autocast(device, torch.bfloat16):
        found = gradient(of, ids, weight, d_y)
    assert found.dtype == dtype
    errors = [(one.double() - exact).abs().max() for one in (found, gradient(F.embedding, ids, weight, d_y))]
    single = 8 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert errors[0] <= errors[1] + single
    assert errors[0] <= torch.finfo(dtype).eps / 2 * exact.abs().max() + single


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_rounded_once(dtype: torch.dtype) -> None:
    assert_rounded_once(_Rows.apply, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 16, MOST_ROWS])
def test_on_a_gpu_it_is_rounded_once_and_the_same_bits_each_time(rows: int, dtype: torch.dtype) -> None:
    assert_rounded_once(embedding, dtype, rows, "cuda")
    weight, ids = table(rows, 64, dtype).detach().cuda().requires_grad_(), torch.randint(rows, (64, 4112)).cuda()
    d_y = torch.randn(64, 4112, 64).to("cuda", dtype)
    found = [gradient(embedding, ids, weight, d_y) for _ in range(5)]
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_on_a_gpu_few_rows_have_it() -> None:
    tables = [torch.randn(rows, 2, device="cuda", requires_grad=True) for rows in (MOST_ROWS, MOST_ROWS + 1)]
    names = [type(embedding(torch.tensor([0]).cuda(), weight).grad_fn).__name__ for weight in tables]
    assert names == ["_RowsBackward", "EmbeddingBackward0"]


def test_a_head_that_is_the_embedding_adds_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(LanguageModelConfig(d_model=16, n_layer=1, vocab_size=16)).double()
    ids = torch.randint(16, (2, 40))
    found: list[Tensor] = []
    for of in (F.embedding, _Rows.apply):
        monkeypatch.setattr("selective_ssm.layers.embedding.embedding", of)
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), ids.roll(1).flatten())
        found += torch.autograd.grad(loss, model.embedding.weight)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_it_is_differentiated_twice() -> None:
    weight, ids = table(3, 2), torch.tensor([0, 2, 0])

    def of(d_y: Tensor) -> Tensor:
        return torch.autograd.grad(_Rows.apply(ids, weight), weight, d_y, create_graph=True)[0]

    assert torch.autograd.gradcheck(of, torch.randn(3, 2, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("of", [_Rows.apply, embedding])
def test_ids_that_no_row_has_are_refused(of: Rows) -> None:
    with pytest.raises(IndexError, match="out of range"):
        of(torch.tensor([5]), table(5, 2))


def test_a_module_of_it_is_one_of_torchs() -> None:
    module = Embedding(5, 2)
    twin = torch.nn.Embedding(5, 2)
    assert repr(module) == repr(twin)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(module(torch.tensor([[4, 0]])), twin(torch.tensor([[4, 0]])))
