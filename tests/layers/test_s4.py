"""S4: kernel, recurrence and HiPPO are what the paper says, in float64 and with dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.layers import S4, S4Config, dplr
from selective_ssm.layers.diagonal import as_pairs
from selective_ssm.layers.s4 import hippo_legs, nplr_legs


def perturbed(d_state: int, width: int = 3) -> S4:
    """As after some training: each channel has a system of its own."""
    s4 = S4(S4Config(d_state=d_state), width=width, d_model=width).double()
    with torch.no_grad():
        for parameter in s4.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return s4


def dense(s4: S4, channel: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ā, B̄ and C of a channel as dense matrices over states and their conjugates, by inverting I - Δ/2 A."""

    def both(x: Tensor) -> Tensor:
        return torch.cat([x, x.conj()])

    def pairs(parameter: Tensor) -> Tensor:
        return both(torch.view_as_complex(parameter[channel].detach().view(-1, 2)))

    rates = both(torch.complex(-s4.A_log[channel].exp(), s4.A_imag[channel]).detach())
    P, B, C = pairs(s4.P), pairs(s4.B), pairs(s4.C)
    A = torch.diag(rates) - torch.outer(P, P.conj())
    eye, dt = torch.eye(len(A), dtype=A.dtype), s4.log_dt[channel].detach().exp()
    inverse = torch.linalg.inv(eye - dt / 2 * A)
    return inverse @ (eye + dt / 2 * A), inverse @ (dt * B), C


def test_hippo_is_its_definition() -> None:
    """Equation 2 of the paper."""
    A, B = hippo_legs(7)
    for n in range(7):
        assert B[n].item() == pytest.approx(math.sqrt(2 * n + 1))
        for k in range(7):
            below = -math.sqrt(2 * n + 1) * math.sqrt(2 * k + 1)
            assert A[n, k].item() == pytest.approx(below if n > k else -(n + 1) if n == k else 0)


@pytest.mark.parametrize("size", [2, 8, 64])
def test_the_start_is_hippo_in_another_basis(size: int) -> None:
    """The same map from inputs to states: B* Aᵏ B does not depend on a unitary basis, nor does A's trace."""
    A, b = hippo_legs(size)
    rates, P, B = (torch.cat([half, half.conj()]) for half in nplr_legs(size))
    transformed = torch.diag(rates) - torch.outer(P, P.conj())
    vector, expected = B, b
    for _ in range(4):
        torch.testing.assert_close((B.conj() @ vector).real, b @ expected, rtol=1e-10, atol=0)
        vector, expected = transformed @ vector, A @ expected
    assert torch.trace(transformed).real.item() == pytest.approx(-size * (size + 1) / 2)
    torch.testing.assert_close(rates.real, torch.full_like(rates.real, -0.5))


@pytest.mark.parametrize("length", [1, 2, 3, 30, 64, 501])
def test_the_kernel_is_the_dense_recurrence(length: int) -> None:
    s4 = perturbed(8)
    kernel = s4.kernel(length)
    for channel in range(3):
        A, h, C = dense(s4, channel)
        expected = []
        for _ in range(length):
            expected.append((C @ h).real)
            h = A @ h
        torch.testing.assert_close(kernel[channel], torch.stack(expected), rtol=1e-9, atol=1e-11)


def test_steps_and_the_state_of_a_sequence_are_the_dense_recurrence() -> None:
    s4, x = perturbed(6), torch.randn(1, 40, 3, dtype=torch.float64)
    y, (end,) = s4(x, return_state=True)
    state = s4.init_state(1, x.device, x.dtype)
    with torch.no_grad():
        for t in range(40):
            s4.step(x[:, t], None, state)
    for channel in range(3):
        A, B, C = dense(s4, channel)
        h = torch.zeros_like(B)
        for t in range(40):
            h = A @ h + B * x[0, t, channel]
        torch.testing.assert_close(state[0][0, channel], h[:3], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(end[0, channel], h[:3], rtol=1e-9, atol=1e-11)
        last = (C @ h).real + s4.D[channel] * x[0, -1, channel]
        torch.testing.assert_close(y[0, -1, channel], last, rtol=1e-9, atol=1e-11)


def test_cauchy_sums_are_the_same_a_few_nodes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    s4 = perturbed(4)
    whole = s4.kernel(50)
    gradients = torch.autograd.grad(whole.square().sum(), [s4.P, s4.A_log, s4.log_dt])
    monkeypatch.setattr(dplr, "_AT_ONCE", 40)
    pieces = s4.kernel(50)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
    again = torch.autograd.grad(pieces.square().sum(), [s4.P, s4.A_log, s4.log_dt])
    for one, other in zip(again, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_differences() -> None:
    s4, x = perturbed(4, width=2), torch.randn(2, 9, 2, dtype=torch.float64)
    names, parameters = zip(*s4.named_parameters(), strict=True)

    def outputs(*values: Tensor) -> Tensor:
        return torch.func.functional_call(s4, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(outputs, parameters)


def test_no_state_grows_whatever_the_parameters() -> None:
    s4 = perturbed(8)
    with torch.no_grad():
        for parameter in s4.parameters():
            parameter += 2 * torch.randn_like(parameter)
        system, _ = s4._system()
        assert (system.rates.real < 0).all()
        h = torch.randn(5, 3, 4, dtype=torch.complex128)
        assert (as_pairs(system.advance(h)).norm(dim=-1) <= as_pairs(h).norm(dim=-1)).all()


def test_an_odd_state_is_refused() -> None:
    with pytest.raises(UserError, match="s4: d_state must be even, got 7"):
        S4Config(d_state=7)
