"""What S6 promises beyond the exam: the gated recurrent network inside it, its initialisation, its size."""

from __future__ import annotations

import math
import pickle
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from selective_ssm.errors import UserError
from selective_ssm.layers import S6, S6Config


def test_theorem_1_a_gated_recurrent_network() -> None:
    """N = 1, A = -1, B = 1, ZOH and softplus: h_t = (1 - g_t) h_{t-1} + g_t x_t with g_t = sigmoid(Linear(x_t))."""
    config = S6Config(d_state=1, dt_rank=6, selective_B=False, selective_C=False, discretization="zoh", skip=False)
    s6 = S6(config, width=6, d_model=6).double()
    with torch.no_grad():
        s6.C.fill_(1)
        s6.dt_bias.normal_()
    x = 3 * torch.randn(2, 50, 6, dtype=torch.float64)
    gate = torch.sigmoid(s6.dt_proj(s6.x_proj(x)) + s6.dt_bias)
    h, expected = torch.zeros(2, 6, dtype=torch.float64), []
    for g_t, x_t in zip(gate.unbind(1), x.unbind(1), strict=True):
        h = (1 - g_t) * h + g_t * x_t
        expected.append(h)
    y, state = s6(x, return_state=True)
    torch.testing.assert_close(y, torch.stack(expected, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state[0][..., 0], h, rtol=1e-12, atol=1e-12)


def test_real_a_starts_at_the_negative_integers() -> None:
    s6 = S6(S6Config(d_state=5), width=7, d_model=4)
    torch.testing.assert_close(-s6.A_log.exp(), -torch.arange(1.0, 6).expand(7, 5))


def test_complex_a_starts_on_a_line() -> None:
    s6 = S6(S6Config(d_state=6, a_init="s4d_lin"), width=7, d_model=4)
    torch.testing.assert_close(-s6.A_log.exp(), torch.full((7, 3), -0.5))
    torch.testing.assert_close(s6.A_imag.detach(), torch.arange(3.0).expand(7, 3))


def test_random_a_differs_between_channels() -> None:
    s6 = S6(S6Config(d_state=64, a_init="random"), width=64, d_model=4)
    A_log = s6.A_log.detach()
    assert A_log.mean().abs() < 0.1
    assert A_log.std() == pytest.approx(1, abs=0.1)


def test_steps_start_log_uniform_within_their_range() -> None:
    s6 = S6(S6Config(dt_min=1e-5, dt_max=0.1, dt_init_floor=1e-4), width=4096, d_model=4)
    dt = F.softplus(s6.dt_bias.detach().double())
    assert dt.min() == pytest.approx(1e-4, rel=1e-3)
    assert dt.max() < 0.1 * (1 + 1e-3)
    below = (dt < 1e-3).double().mean()  # half of the decades between 1e-5 and 0.1
    assert below == pytest.approx(0.5, abs=0.05)


def test_a_complex_state_has_as_many_parameters_as_a_real_one() -> None:
    def size(**switches: object) -> int:
        s6 = S6(S6Config(d_state=8, **switches), width=12, d_model=6)
        return sum(parameter.numel() for parameter in s6.parameters())

    assert size(a_init="s4d_lin") == size()
    assert size(a_init="s4d_lin", selective_B=False) == size(selective_B=False)


@pytest.mark.parametrize(("d_model", "dt_rank", "rank"), [(768, "auto", 48), (20, "auto", 2), (20, 1, 1), (20, 40, 40)])
def test_rank_of_delta(d_model: int, dt_rank: int, rank: int) -> None:
    s6 = S6(S6Config(dt_rank=dt_rank), width=2 * d_model, d_model=d_model)
    assert s6.dt_proj.in_features == rank
    assert s6.dt_proj.weight.abs().max() <= 1 / math.sqrt(rank)


def test_a_fixed_everything_needs_no_projection() -> None:
    s6 = S6(S6Config(selective_delta=False, selective_B=False, selective_C=False), width=6, d_model=3)
    assert {name for name, _ in s6.named_parameters()} == {"A_log", "B", "C", "D", "dt_bias"}


def test_norms_are_of_each_projection_by_itself() -> None:
    """As if x_proj gave each of Δ's R numbers, B and C divided by its root mean square."""
    plain = S6(S6Config(d_state=5, dt_rank=3), width=6, d_model=6).double()
    normed = S6(S6Config(d_state=5, dt_rank=3, norm_eps=0.25), width=6, d_model=6).double()
    normed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    parts = plain.x_proj(x).split([3, 5, 5], dim=-1)
    scaled = torch.cat([part / (part.square().mean(-1, keepdim=True) + 0.25).sqrt() for part in parts], dim=-1)
    plain.x_proj.register_forward_hook(lambda *_: scaled)
    torch.testing.assert_close(normed(x)[0], plain(x)[0], rtol=1e-12, atol=1e-12)


def test_configs_pickle() -> None:
    config = S6Config(dt_rank=3, a_init="s4d_lin")
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("switches", "sentence"),
    [
        ({"d_state": 0}, "d_state must be greater than 0"),
        ({"d_state": 3, "a_init": "s4d_lin"}, "d_state must be even"),
        ({"a_init": "s4d"}, "did you mean 's4d_"),
        ({"discretization": "bilinear"}, "discretization must be one of"),
        ({"dt_rank": 0}, "dt_rank must be greater than 0"),
        ({"norm_eps": 0.0}, "norm_eps must be greater than 0"),
        ({"dt_min": 1.0}, "dt_min must not exceed dt_max"),
    ],
)
def test_impossible_configs_are_refused(switches: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        S6Config(**switches)


def test_a_rank_beyond_the_width_is_refused() -> None:
    with pytest.raises(UserError, match="at most the 6 channels"):
        S6(S6Config(dt_rank=7), width=6, d_model=3)


@pytest.mark.parametrize("a_init", ["s4d_real", "s4d_lin"])
def test_a_delta_of_next_to_nothing_ignores_its_input(a_init: Literal["s4d_real", "s4d_lin"]) -> None:
    """softplus(-100) is a subnormal number."""
    s6 = S6(S6Config(d_state=4, a_init=a_init, discretization="zoh", selective_delta=False, skip=False), 3, 3)
    torch.nn.init.constant_(s6.dt_bias, -100.0)
    y, _ = s6(torch.randn(1, 5, 3))
    assert y.abs().max() < 1e-30
    y.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in s6.parameters())
