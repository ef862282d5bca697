"""The Mamba block: what lies inside, and how it starts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.layers import Mamba, MambaConfig, S6Config


def test_names_in_the_state_dict() -> None:
    block = Mamba(MambaConfig(), d_model=8)
    assert set(block.state_dict()) == {
        "in_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "ssm.x_proj.weight",
        "ssm.dt_proj.weight",
        "ssm.dt_bias",
        "ssm.A_log",
        "ssm.D",
        "out_proj.weight",
    }


def plain_block(block: Mamba, x: Tensor) -> Tensor:
    """Algorithm 2 and Figure 3 in plain words: one token after the other, (L, d_model)."""
    u, z = (x @ block.in_proj.weight.T).chunk(2, dim=-1)
    weight, bias = block.conv1d.weight, block.conv1d.bias
    padded = F.pad(u, (0, 0, weight.shape[1] - 1, 0))
    u = F.silu(torch.stack([(padded[t : t + weight.shape[1]].T * weight).sum(1) + bias for t in range(len(x))]))
    ssm = block.ssm
    rank, states = ssm.dt_proj.in_features, ssm.A_log.shape[1]
    low_rank, B, C = (u @ ssm.x_proj.weight.T).split([rank, states, states], dim=-1)
    dt = F.softplus(low_rank @ ssm.dt_proj.weight.T + ssm.dt_bias)
    h = torch.zeros_like(ssm.A_log)
    ys = []
    for t in range(len(x)):
        h = torch.exp(dt[t, :, None] * -ssm.A_log.exp()) * h + (dt[t] * u[t])[:, None] * B[t]
        ys.append(h @ C[t] + ssm.D * u[t])
    return (torch.stack(ys) * F.silu(z)) @ block.out_proj.weight.T


def test_the_block_is_what_the_paper_draws() -> None:
    block = Mamba(MambaConfig(ssm=S6Config(d_state=3, dt_rank=2)), d_model=4).double()
    x = torch.randn(11, 4, dtype=torch.float64)
    torch.testing.assert_close(block(x[None])[0][0], plain_block(block, x), rtol=1e-10, atol=1e-12)


def test_a_block_without_an_ssm_is_a_gated_convolution() -> None:
    block = Mamba(MambaConfig(ssm=None), d_model=4).double()
    x = torch.randn(1, 9, 4, dtype=torch.float64)
    u, z = block.in_proj(x).chunk(2, dim=-1)
    u = F.conv1d(F.pad(u.mT, (3, 0)), block.conv1d.weight[:, None], block.conv1d.bias, groups=8).mT
    torch.testing.assert_close(block(x)[0], block.out_proj(F.silu(u) * F.silu(z)))
    assert not any(name.startswith("ssm") for name in block.state_dict())


def test_adapters_can_take_the_place_of_every_linear() -> None:
    """Each linear is called exactly once a forward, as a module."""
    block = Mamba(MambaConfig(), d_model=4)
    calls: list[str] = []
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    block(torch.randn(1, 3, 4))
    assert calls == ["in_proj", "ssm.x_proj", "ssm.dt_proj", "out_proj"]


def test_the_block_starts_as_released() -> None:
    block = Mamba(MambaConfig(bias=True), d_model=64)
    assert not block.in_proj.bias.any()
    assert not block.out_proj.bias.any()
    for module, inputs in ((block.in_proj, 64), (block.out_proj, 128), (block.conv1d, 4)):
        weight = module.weight.detach()
        assert weight.abs().max() == pytest.approx(1 / math.sqrt(inputs), rel=0.01)
        assert weight.std() == pytest.approx(1 / math.sqrt(3 * inputs), rel=0.1)


def test_impossible_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="mamba: d_conv must be greater than 0, got 0"):
        MambaConfig(d_conv=0)
