"""The plain block: what lies inside, and that nothing gates it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from selective_ssm.layers import Plain, PlainConfig, S4Config


def test_the_block_is_a_linear_an_ssm_an_activation_and_a_linear() -> None:
    block = Plain(PlainConfig(ssm=S4Config(d_state=4)), d_model=3).double()
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    inside = F.linear(x, block.in_proj.weight, block.in_proj.bias)
    expected = F.linear(F.gelu(block.ssm(inside)[0]), block.out_proj.weight, block.out_proj.bias)
    torch.testing.assert_close(block(x)[0], expected)


def test_a_convolution_stands_in_front_where_asked_for() -> None:
    block = Plain(PlainConfig(expand=2, d_conv=4, bias=False), d_model=3)
    assert {name.split(".")[0] for name in block.state_dict()} == {"in_proj", "conv1d", "ssm", "out_proj"}
    assert block.conv1d.weight.shape == (6, 4)
    assert block.conv1d.bias is None
