"""The shift SSM is a filter of its own length."""

from __future__ import annotations

import torch

from selective_ssm.layers import Shift, ShiftConfig


def test_the_answer_to_an_impulse_is_c() -> None:
    shift = Shift(ShiftConfig(d_state=4), width=2, d_model=2).double()
    x = torch.zeros(1, 9, 2, dtype=torch.float64)
    x[0, 2] = 1
    y = shift(x)[0][0]
    torch.testing.assert_close(y[2:6], shift.conv1d.weight.flip(1).T)
    assert not y[:2].any()
    assert not y[6:].any()


def test_the_state_is_the_last_inputs() -> None:
    shift = Shift(ShiftConfig(d_state=3), width=2, d_model=2)
    x = torch.randn(1, 7, 2)
    _, state = shift(x, return_state=True)
    torch.testing.assert_close(state[0], x[:, -2:].mT)
