"""The Hyena filter: as long as the sequence, drawn from positions, and the sum that its FFT stands for."""

from __future__ import annotations

import math

import pytest
import torch

from selective_ssm.errors import UserError
from selective_ssm.layers import HyenaFilter, HyenaFilterConfig

CONFIG = HyenaFilterConfig(filter_length=50, bands=3, hidden=8)


def build(width: int = 3) -> HyenaFilter:
    return HyenaFilter(CONFIG, width=width, d_model=width).double()


def test_the_filter_is_what_the_paper_draws() -> None:
    """Equation 7: a window over an MLP, with sines between, of the features of one position after the other."""
    long = build()
    rates = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, 3, dtype=torch.float64)
    kernel = long.kernel(60)
    for place in (0, 1, 17, 49, 59):
        t = place / 50
        angles = [2 * math.pi * k * t for k in range(3)]
        features = [t, *(math.cos(angle) for angle in angles), *(math.sin(angle) for angle in angles)]
        hidden = torch.tensor(features, dtype=torch.float64)
        *inner, last = long.mlp
        for linear in inner:
            hidden = torch.sin(10.0 * (linear.weight @ hidden + linear.bias))
        expected = (last.weight @ hidden) * (torch.exp(-rates * t) + 0.01)
        torch.testing.assert_close(kernel[:, place], expected, rtol=1e-10, atol=1e-12)


def test_the_filter_is_as_long_as_the_sequence_and_looks_back_only() -> None:
    long = build()
    x = torch.randn(1, 120, 3, dtype=torch.float64)
    moved = x.clone()
    moved[0, 40] += 1
    change = (long(moved)[0] - long(x)[0])[0].abs()
    assert change[:40].max() < 1e-12
    assert (change[40:].amax(1) > 1e-6).all()  # past filter_length too, where the window's floor is left
    torch.testing.assert_close(long.kernel(120)[:, :70], long.kernel(70))


@pytest.mark.parametrize("read", [0, 1, 20])
def test_convolution_is_the_direct_sum_from_a_state_too(read: int) -> None:
    long = build()
    x, z = torch.randn(2, 2, 31, 3, dtype=torch.float64)
    kernel = long.kernel(31)
    expected = torch.stack(
        [sum(kernel[:, lag] * x[:, t - lag] for lag in range(t + 1)) + long.D * x[:, t] for t in range(31)], 1
    ) * torch.nn.functional.silu(z)
    _, state = long(x[:, :read], return_state=True)
    y, (inputs, length) = long(x[:, read:], z[:, read:], state, return_state=True)
    torch.testing.assert_close(y, expected[:, read:], rtol=1e-10, atol=1e-10)
    assert torch.equal(inputs, x)
    assert length.tolist() == [31, 31]


def test_the_window_of_each_channel_falls_to_a_hundredth_where_it_should() -> None:
    """Seen in a filter whose MLP is constant."""
    config = HyenaFilterConfig(filter_length=100, bands=1, hidden=2, depth=2, window_floor=0.0)
    long = HyenaFilter(config, width=2, d_model=2).double()
    with torch.no_grad():
        long.mlp[0].weight.zero_()
        long.mlp[0].bias.fill_(0.1)
        long.mlp[1].weight.fill_(1)
    kernel = long.kernel(151) / long.kernel(1)
    assert kernel[0, 150].item() == pytest.approx(0.01)
    assert kernel[1, 30].item() == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("switches", "sentence"),
    [
        ({"depth": 1}, "depth must be at least 2, got 1"),
        ({"window_floor": -0.1}, "window_floor must not be negative"),
        ({"filter_length": 0}, "filter_length must be greater than 0"),
    ],
)
def test_impossible_filters_are_refused(switches: dict[str, float], sentence: str) -> None:
    with pytest.raises(UserError, match=f"hyena_filter: {sentence}"):
        HyenaFilterConfig(**switches)
