"""RWKV against its equations, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.layers.rwkv import RWKV, RWKVChannel, RWKVChannelConfig, RWKVConfig
from selective_ssm.layers.token_shift import shifted, shifted_step
from tests.ops.test_wkv import by_definition


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
