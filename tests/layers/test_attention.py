"""Attention: what torch's own does, with its cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.layers import Attention, AttentionConfig
from selective_ssm.layers import attention as module

WIDTH = 8


def build(**config: object) -> Attention:
    return Attention(AttentionConfig(**config), WIDTH).double()  # pyright: ignore[reportArgumentType]


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64)


def test_names_in_the_state_dict() -> None:
    assert set(build().state_dict()) == {"in_proj.weight", "out_proj.weight"}
    assert set(build(bias=True).state_dict()) == {"in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"}


def by_torch(attention: Attention, x: Tensor) -> Tensor:
    """Projections, torch's attention and the last projection, one after the other."""
    q, k, v = (
        part.unflatten(-1, (2, 4)).transpose(1, 2)
        for part in F.linear(x, attention.in_proj.weight, attention.in_proj.bias).chunk(3, dim=-1)
    )
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(y.transpose(1, 2).flatten(2), attention.out_proj.weight, attention.out_proj.bias)


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_torch_s_own_at_once_and_unrolled(bias: bool) -> None:
    attention, x = build(n_heads=2, bias=bias), some(3, 11)
    expected = by_torch(attention, x)
    torch.testing.assert_close(attention(x)[0], expected, rtol=1e-10, atol=1e-12)
    state = attention.init_state(3, x.device, x.dtype, max_length=11)
    with torch.no_grad():
        for t in range(11):
            y, state = attention.step(x[:, t], state)
            torch.testing.assert_close(y, expected[:, t], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("positions", ["none", "rope", "xpos"])
def test_shared_heads_are_repeated_ones(positions: str) -> None:
    grouped = build(n_heads=4, n_kv_heads=2, head_dim=2, positions=positions)
    whole = build(n_heads=4, head_dim=2, positions=positions)
    q, k, v = grouped.in_proj.weight.data.split([8, 4, 4])
    repeated = (one.unflatten(0, (2, 2)).repeat_interleave(2, dim=0).flatten(0, 1) for one in (k, v))
    whole.in_proj.weight.data = torch.cat([q, *repeated])
    whole.out_proj.weight.data = grouped.out_proj.weight.data
    x = some(2, 9)
    torch.testing.assert_close(grouped(x)[0], whole(x)[0], rtol=1e-10, atol=1e-12)
    resumed = (one(x[:, 4:], one(x[:, :4], return_state=True)[1])[0] for one in (grouped, whole))
    torch.testing.assert_close(*resumed, rtol=1e-10, atol=1e-12)


def answers_after(attention: Attention, x: Tensor, silence: int) -> Tensor:
    """To x, after so many tokens that are never looked at: their keys repel every query, and their values are zero."""
    state = attention.init_state(1, x.device, x.dtype, max_length=silence + x.shape[1])
    state[2].fill_(silence)
    with torch.no_grad():
        heard, _ = attention(x, state, return_state=True)
    return heard


@pytest.mark.parametrize("positions", ["rope", "xpos"])
def test_a_shift_changes_nothing_but_who_else_is_heard(positions: str) -> None:
    """A million tokens with zero keys and values weigh e^0 each; beside them all is as ever."""
    attention, x, silence = build(n_heads=1, head_dim=2, positions=positions), some(1, 5), 10**6
    q, k, _ = attention._project(x, torch.arange(5)[None])
    distance = torch.arange(5.0).double()[:, None] - torch.arange(5)
    scores = q[0, :, 0] @ k[0, :, 0].T
    if positions == "xpos":  # a head of one pair: ζ_0 = 0.4 / 1.4
        scores = scores * (0.4 / 1.4) ** (distance / 512)
    weights = (scores / 2**0.5).exp().tril()
    expected = attention(x)[0] * (weights.sum(1) / (weights.sum(1) + silence))[:, None]
    heard = answers_after(attention, x, silence)
    assert (heard - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_order_is_unknown_without_positions() -> None:
    x = some(1, 6)
    mixed = x[:, [2, 0, 4, 1, 3, 5]]
    for positions, same in (("none", True), ("rope", False), ("xpos", False)):
        attention = build(n_heads=2, positions=positions)
        assert torch.allclose(attention(x)[0][:, 5], attention(mixed)[0][:, 5]) is same


def test_a_pack_of_a_gpu_goes_past_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x, cuts = build(n_heads=2, positions="rope"), some(1, 9), torch.tensor([0, 4, 4, 9])
    expected = attention(x, cu_seqlens=cuts)[0]
    calls: list[int] = []

    def packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        calls.append(len(q))
        pieces = (one.transpose(0, 1)[None].split(cu_seqlens.diff().tolist(), dim=2) for one in (q, k, v))
        ys = [F.scaled_dot_product_attention(*piece, is_causal=True) for piece in zip(*pieces, strict=True)]
        return torch.cat(ys, 2)[0].transpose(0, 1)

    monkeypatch.setattr(module, "runs_packed", lambda q: True)
    monkeypatch.setattr(module, "attend_packed", packed)
    torch.testing.assert_close(attention(x, cu_seqlens=cuts)[0], expected, rtol=1e-10, atol=1e-12)
    assert calls == [9]
    attention(x, cu_seqlens=cuts, return_state=True)
    assert calls == [9], "whose state is wanted is laid out in rows"


def test_what_is_not_a_number_stays_in_its_sequence() -> None:
    attention, x, cuts = build(n_heads=2), some(1, 9), torch.tensor([0, 4, 9])
    x[0, 2] = torch.nan
    y, state = attention(x, cu_seqlens=cuts, return_state=True)
    assert y[0, 4:].isfinite().all()
    assert attention(some(2, 3), state)[0][1].isfinite().all()


def test_room_is_kept_and_made() -> None:
    attention, x = build(n_heads=2), some(2, 5)
    start = attention.init_state(2, x.device, x.dtype, max_length=7)
    _, state = attention(x, start, return_state=True)
    assert state[0].shape == (2, 7, 2, 4)
    assert state[2].tolist() == [5, 5]
    _, more = attention(x, state, return_state=True)
    assert more[0].shape == (2, 10, 2, 4)
    assert start[2].tolist() == [0, 0]
    assert not start[0].any()


def test_a_full_row_is_named_before_anything_is_written() -> None:
    attention, x = build(n_heads=2), some(2, 3)
    _, state = attention(x, return_state=True)
    kept = tuple(part.clone() for part in state)
    with (
        torch.no_grad(),
        pytest.raises(UserError, match="room for 3 tokens and is full: give init_state a larger max_l"),
    ):
        attention.step(x[:, 0], state)
    assert all(torch.equal(part, copy) for part, copy in zip(state, kept, strict=True))


def test_where_lengths_cannot_be_seen_a_full_row_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: row 0 is full, row 1 is padding, row 2 has room."""
    attention = build(n_heads=2)
    x = some(3)
    _, state = attention(some(1, 5), cu_seqlens=torch.tensor([0, 4, 5]), return_state=True)
    state = (*(cache.detach() for cache in state[:2]), state[2])
    short = tuple(part[1:].clone() for part in state)
    kept = tuple(part.clone() for part in state)
    monkeypatch.setattr("selective_ssm.ops.checks._values_can_be_read", lambda x: False)
    with torch.no_grad():
        expected, after = attention.step(x[2:], short)
        y, state = attention.step(x, state, state_indices=torch.tensor([0, -1, 1]))
    assert state[2].tolist() == [4, 2]
    torch.testing.assert_close(y[2:], expected)
    assert all(torch.equal(part[0], copy[0]) for part, copy in zip(state, kept, strict=True))
    for part, new in zip(state, after, strict=True):
        torch.testing.assert_close(part[1], new[0])


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"n_heads": 4, "n_kv_heads": 3}, "attention: n_kv_heads must divide n_heads = 4, got 3"),
        ({"n_heads": 3}, "attention: n_heads must divide d_model = 8 or head_dim be given, got 3"),
        ({"n_heads": 8, "positions": "rope"}, "attention: rope turns pairs: head_dim must be even, got 1"),
        ({"positions": "alibi"}, "positions must be one of 'none', 'rope', 'xpos'"),
        ({"n_heads": 0}, "attention: n_heads must be greater than 0"),
    ],
)
def test_impossible_attentions_are_refused(config: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(**config)
