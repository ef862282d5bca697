"""Softmax attention after what came before: against the sum written out, whatever block, kernel or pack it runs in."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.layers import attend as module
from selective_ssm.layers.attend import attend, attend_packed, runs_packed

H, G, P = 4, 2, 6


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, P, dtype=torch.float64)


def written_out(q: Tensor, k: Tensor, v: Tensor, before: Tensor, *, xpos: bool = False) -> Tensor:
    """Token by token and head by head; with xPos, the decay of the distance on each pair of a product."""
    y = torch.zeros_like(q)
    zeta = (torch.arange(0, P, 2, dtype=q.dtype) / P + 0.4) / 1.4
    for row, start in enumerate(before.tolist()):
        for t in range(q.shape[1]):
            for head in range(H):
                seen = slice(0, start + t + 1)
                products = q[row, t, head] * k[row, seen, head // (H // G)]
                distance = start + t - torch.arange(start + t + 1, dtype=q.dtype)
                if xpos:
                    products = products * (zeta ** (distance[:, None] / 512)).repeat_interleave(2, 1)
                weights = (products.sum(1) / P**0.5).softmax(0)
                y[row, t, head] = weights @ v[row, seen, head // (H // G)]
    return y


@pytest.mark.parametrize("xpos", [False, True])
@pytest.mark.parametrize("before", [[0, 0], [3, 3], [5, 0]])
@pytest.mark.parametrize("block", [1024, 3])
def test_rows_of_any_past_see_all_up_to_themselves(
    before: list[int], block: int, xpos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_QUERIES", block)
    q, k, v = some(2, 7, H), some(2, 14, G), some(2, 14, G)
    past = torch.tensor(before)
    expected = written_out(q, k, v, past, xpos=xpos)
    torch.testing.assert_close(attend(q, k, v, past, max(before), xpos=xpos), expected, rtol=1e-10, atol=1e-12)


def test_a_million_tokens_later_nothing_overflows() -> None:
    """The scores of xPos are relative to who asks: twice the same far query, in one block and in blocks of its own."""
    far = 10**6
    q, k, v = torch.randn(1, 3, 1, 2), torch.randn(1, far + 3, 1, 2), torch.randn(1, far + 3, 1, 2)
    y = attend(q, k, v, torch.tensor([far]), far, xpos=True)
    exact = attend(q.double(), k.double(), v.double(), torch.tensor([far]), far, xpos=True)
    alone = attend(q[:, 2:], k, v, torch.tensor([far + 2]), far + 2, xpos=True)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone.double(), exact[:, 2:], rtol=0, atol=1e-5)


def reference_varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_k: Tensor, most: int, most_k: int) -> Tensor:
    assert torch.equal(cu, cu_k)
    assert cu.dtype == torch.int32
    assert most == most_k >= int(cu.diff().max())
    pieces = (x.transpose(0, 1)[None].split(cu.diff().tolist(), dim=2) for x in (q, k, v))
    heads = [F.scaled_dot_product_attention(*piece, is_causal=True) for piece in zip(*pieces, strict=True)]
    return torch.cat(heads, 2)[0].transpose(0, 1)


def first_form(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    assert is_causal
    return reference_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def second_form(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
    assert window_size == (-1, 0)
    return reference_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


@pytest.mark.parametrize("form", [first_form, second_form])
def test_packs_are_handed_to_torch_as_it_wants_them(form: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "import_module", lambda name: types.SimpleNamespace(varlen_attn=form))
    q, k, v = some(9, H), some(9, G), some(9, G)
    y = attend_packed(q, k, v, torch.tensor([0, 4, 4, 9]))
    for piece in (slice(0, 4), slice(4, 9)):
        own = attend(q[None, piece], k[None, piece], v[None, piece], torch.tensor([0]), 0)[0]
        torch.testing.assert_close(y[piece], own, rtol=1e-10, atol=1e-12)


def test_packs_need_a_gpu_and_half_precision() -> None:
    assert not runs_packed(torch.zeros(1, 3, 2, 8, dtype=torch.bfloat16))


def test_torch_has_what_packs_are_handed_to() -> None:
    """Its arguments are still those that `attend_packed` gives."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    names = module.signature(varlen.varlen_attn).parameters
    assert list(names)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert "is_causal" in names or "window_size" in names
