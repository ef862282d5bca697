"""RWKV against its equations, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.layers.rwkv import RWKV, RWKVChannel, RWKVChannelConfig, RWKVConfig
from selective_ssm.layers.token_shift import shifted, shifted_step
from selective_ssm.layers.wkv import no_average, wkv, wkv_step


def by_definition(k: Tensor, v: Tensor, fade: Tensor, bonus: Tensor) -> Tensor:
    """All sums written out, (B, L, D)."""
    ys: list[Tensor] = []
    for t in range(k.shape[1]):
        age = torch.arange(t - 1, -1, -1, dtype=k.dtype)[:, None]
        logits = torch.cat([k[:, :t] - age * fade, k[:, t : t + 1] + bonus], 1)
        ys.append((logits.softmax(1) * v[:, : t + 1]).sum(1))
    return torch.stack(ys, 1)


def drawn(length: int, size: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, v = size * torch.randn(2, length, 5, dtype=dtype), torch.randn(2, length, 5, dtype=dtype)
    return k, v, torch.rand(5, dtype=dtype), torch.randn(5, dtype=dtype)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 257])
def test_averages_are_those_of_the_definition(length: int) -> None:
    arguments = drawn(length)
    y, _ = wkv(*arguments, no_average(2, 5, arguments[0].device, torch.float64))
    torch.testing.assert_close(y, by_definition(*arguments), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_no_weight_overflows_or_vanishes(size: float) -> None:
    """e^1000 is not a number of any format, and e^-1000 nothing at all: only their ratios matter."""
    arguments = drawn(80, size, torch.float32)
    expected = by_definition(*(x.double() for x in arguments))
    state = no_average(2, 5, expected.device, torch.float32)
    y, end = wkv(*arguments, state)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-3 * size / 1000)
    k, v, fade, bonus = arguments
    stepped = torch.stack([wkv_step(k[:, t], v[:, t], fade, bonus, state) for t in range(80)], 1)
    torch.testing.assert_close(stepped.double(), expected, rtol=0, atol=2e-3 * size / 1000)
    assert state.isfinite().all()
    assert end.isfinite().all()


def test_without_fading_a_token_counts_as_all_others_do() -> None:
    k, v = torch.zeros(1, 40, 1), torch.arange(40.0)[None, :, None]
    y, _ = wkv(k, v, torch.zeros(1), torch.zeros(1), no_average(1, 1, k.device, k.dtype))
    torch.testing.assert_close(y[0, :, 0], torch.arange(40.0) / 2)


def test_gradients_of_large_logits_are_finite() -> None:
    k, v, fade, bonus = (x.requires_grad_() for x in drawn(50, 500.0, torch.float32))
    y, _ = wkv(k, v, fade, bonus, no_average(2, 5, k.device, k.dtype))
    for gradient in torch.autograd.grad(y.sum(), (k, v, fade, bonus)):
        assert gradient.isfinite().all()


def test_what_stands_before_a_token() -> None:
    x, last = torch.randn(1, 7, 3), torch.randn(3, 3, 1)
    cu_seqlens = torch.tensor([0, 4, 4, 7])
    previous, end = shifted(x, last, cu_seqlens=cu_seqlens, return_state=True)
    assert torch.equal(previous[0], torch.stack([last[0, :, 0], *x[0, :3], last[2, :, 0], *x[0, 4:6]]))
    assert end is not None
    assert torch.equal(end[..., 0], torch.stack([x[0, 3], last[1, :, 0], x[0, 6]]))
    slots = last.clone()
    assert torch.equal(shifted_step(x[0, :1], slots, state_indices=torch.tensor([2])), last[2:, :, 0])
    assert torch.equal(slots[..., 0], torch.stack([*last[:2, :, 0], x[0, 0]]))


def test_layers_are_their_equations() -> None:
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)

    def seen(linear: torch.nn.Module, mix: Tensor) -> Tensor:
        return linear(mix * x + (1 - mix) * before)

    time = RWKV(RWKVConfig(), 4).double()
    r, k, v = (seen(getattr(time, f"{one}_proj"), getattr(time, f"mix_{one}")) for one in "rkv")
    averages = by_definition(k, v, time.fade_log.exp(), time.bonus)
    torch.testing.assert_close(time(x)[0], time.out_proj(torch.sigmoid(r) * averages))

    channel = RWKVChannel(RWKVChannelConfig(expansion=3.5), 4).double()
    r, k = seen(channel.r_proj, channel.mix_r), seen(channel.k_proj, channel.mix_k)
    assert k.shape[-1] == 14
    torch.testing.assert_close(channel(x)[0], torch.sigmoid(r) * channel.out_proj(k.clamp_min(0) ** 2))


def test_initial_values_depend_on_the_place_in_the_model() -> None:
    first, last = RWKV(RWKVConfig(depth=0), 9), RWKV(RWKVConfig(depth=1), 9)
    assert first.fade_log.tolist() == pytest.approx([8 * (i / 8) ** 0.7 - 5 for i in range(9)])
    assert last.fade_log.tolist() == pytest.approx([8 * (i / 8) ** 2 - 5 for i in range(9)])
    assert first.mix_k.tolist() == pytest.approx([i / 8 for i in range(9)])
    assert last.mix_k.tolist() == pytest.approx([1.0] * 9)
    assert last.mix_v.tolist() == pytest.approx([1.3] * 9)
    assert first.bonus[:3].tolist() == pytest.approx([math.log(0.3) + one for one in (0, 0.5, -0.5)])
    with pytest.raises(UserError, match="depth must be from 0"):
        RWKVConfig(depth=1.5)
