"""Hyena: its order, its gates and its long filters are those of the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from selective_ssm.errors import UserError
from selective_ssm.layers import Hyena, HyenaConfig, HyenaFilterConfig

FILTER = HyenaFilterConfig(filter_length=30, bands=2, hidden=8)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_hyena_is_its_definition(order: int) -> None:
    """Definition 3.1, with every convolution as a matrix."""
    length, width = 20, 3
    block = Hyena(HyenaConfig(order=order, filter=FILTER), d_model=width).double()
    x = torch.randn(length, width, dtype=torch.float64)
    projected = F.linear(x, block.in_proj.weight, block.in_proj.bias)
    padded = F.pad(projected, (0, 0, 2, 0))
    short = block.conv1d.bias + sum(padded[k : k + length] * block.conv1d.weight[:, k] for k in range(3))
    z, *gates = short.chunk(order + 1, dim=-1)
    lag = torch.arange(length)[:, None] - torch.arange(length)
    for long, gate in zip(block.filters, gates, strict=True):
        kernel = long.kernel(length)
        kernel = torch.cat([kernel[:, :1] + long.D[:, None], kernel[:, 1:]], 1)
        toeplitz = kernel[:, lag.clamp_min(0)].masked_fill(lag < 0, 0)  # (D, L, L)
        z = gate * torch.einsum("dts,sd->td", toeplitz, z)
    expected = F.linear(z, block.out_proj.weight, block.out_proj.bias)
    torch.testing.assert_close(block(x[None])[0][0], expected, rtol=1e-10, atol=1e-10)


def test_a_token_reaches_every_later_one_and_no_earlier_one() -> None:
    block = Hyena(HyenaConfig(filter=FILTER), d_model=4).double()
    x = torch.randn(1, 80, 4, dtype=torch.float64)
    moved = x.clone()
    moved[0, 33] += 1
    change = (block(moved)[0] - block(x)[0])[0].abs().amax(1)
    assert change[:33].max() < 1e-12
    assert (change[33:] > 1e-9).all()


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="hyena: order must be greater than 0, got 0"):
        HyenaConfig(order=0)
