"""S4D: the long convolution and the recurrence are one map."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from selective_ssm.errors import UserError
from selective_ssm.layers import S4D, S4DConfig

CONFIGS = [
    S4DConfig(d_state=8, a_init=a_init, discretization=discretization)
    for a_init in ("real", "lin", "inv")
    for discretization in ("zoh", "euler")
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.a_init} {config.discretization}")
@pytest.mark.parametrize("length", [1, 2, 63, 200])
def test_convolution_is_recurrence(config: S4DConfig, length: int) -> None:
    """From nothing and from a state; the recurrence is the scan's own, token by token."""
    s4d = S4D(config, width=5, d_model=5).double()
    x, z = torch.randn(2, 2, length, 5, dtype=torch.float64)
    start = torch.randn_like(s4d.init_state(2, x.device, x.dtype)[0])
    for before in (torch.zeros_like(start), start):
        y, end = s4d(x, z, (before,), return_state=True)
        state = (before.clone(),)
        with torch.no_grad():
            steps = [s4d.step(x[:, t], z[:, t], state)[0] for t in range(length)]
        recurred = torch.stack(steps, 1)
        assert (y - recurred).abs().max() <= 1e-9 * recurred.abs().max()
        assert (end[0] - state[0]).abs().max() <= 1e-9 * state[0].abs().max()
    stateless, none = s4d(x, z)
    assert none is None
    torch.testing.assert_close(stateless, s4d(x, z, (torch.zeros_like(start),))[0])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.a_init} {config.discretization}")
def test_the_kernel_is_the_answer_to_an_impulse(config: S4DConfig) -> None:
    """K_l = C Ā^l B̄, power by power."""
    s4d = S4D(config, width=3, d_model=3).double()
    A = -s4d.A_log.exp() if s4d.A_imag is None else torch.complex(-s4d.A_log.exp(), s4d.A_imag)
    C = s4d.C if s4d.A_imag is None else torch.complex(s4d.C[:, ::2], s4d.C[:, 1::2])
    dt = s4d.log_dt.exp()[:, None]
    A_bar = (dt * A).exp()
    B_bar = dt if config.discretization == "euler" else (A_bar - 1) / A
    terms = torch.stack([(C * A_bar**power * B_bar).sum(1) for power in range(30)], 1)
    expected = terms if s4d.A_imag is None else 2 * terms.real
    torch.testing.assert_close(s4d.kernel(30), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.a_init} {config.discretization}")
@pytest.mark.parametrize("length", [1, 2, 37])
def test_both_directions_are_a_recurrence_each(config: S4DConfig, length: int) -> None:
    """What comes before by C, what follows by C_ahead, and the token itself with the former alone."""
    both = S4D(replace(config, bidirectional=True), width=3, d_model=3).double()
    one = S4D(config, width=3, d_model=3).double()
    one.load_state_dict(both.state_dict(), strict=False)
    x, z = torch.randn(2, 2, length, 3, dtype=torch.float64)
    past = one(x)[0]
    with torch.no_grad():
        one.C.copy_(both.C_ahead)
        one.D.zero_()
    future = one(x.flip(1))[0].flip(1)
    expected = (past + torch.cat([future[:, 1:], torch.zeros_like(future[:, :1])], 1)) * torch.nn.functional.silu(z)
    torch.testing.assert_close(both(x, z)[0], expected, rtol=1e-9, atol=1e-12)


def test_both_directions_refuse_what_came_before() -> None:
    s4d = S4D(S4DConfig(d_state=4, bidirectional=True), width=3, d_model=3)
    state = S4D(S4DConfig(d_state=4), width=3, d_model=3).init_state(1, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="s4d: a bidirectional S4D depends on what follows"):
        s4d(torch.zeros(1, 2, 3), None, state)
    with pytest.raises(UserError, match="s4d: a bidirectional S4D depends on what follows"):
        s4d.step(torch.zeros(1, 3), None, state)


def test_initialisations_of_a() -> None:
    def imaginary(a_init: str) -> list[float]:
        return S4D(S4DConfig(d_state=8, a_init=a_init), width=2, d_model=2).A_imag[0].tolist()

    assert imaginary("lin") == pytest.approx([0, math.pi, 2 * math.pi, 3 * math.pi])
    assert imaginary("inv") == pytest.approx([8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)])
    real = S4D(S4DConfig(d_state=4, a_init="real"), width=2, d_model=2)
    assert real.A_imag is None
    assert real.A_log[1].exp().tolist() == pytest.approx([1, 2, 3, 4])


def test_convolution_keeps_low_precision_outside() -> None:
    s4d = S4D(S4DConfig(d_state=4, a_init="real"), width=4, d_model=4)
    x = torch.randn(1, 33, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = s4d(x)[0]
        kernel = s4d.kernel(33)
    assert torch.equal(kernel, s4d.kernel(33))
    assert torch.equal(y, s4d(x)[0])
    assert s4d(x.bfloat16())[0].dtype == torch.bfloat16


def test_an_odd_complex_state_is_refused() -> None:
    with pytest.raises(UserError, match="s4d: d_state must be even"):
        S4DConfig(d_state=7)
