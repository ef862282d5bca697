"""The gated attention unit, written out token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.layers import GAU, GAUConfig
from selective_ssm.layers import gau as module

D_MODEL, P = 5, 4


def build(**config: object) -> GAU:
    gau = GAU(GAUConfig(head_dim=P, **config), D_MODEL).double()  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in gau.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return gau


def bias(gau: GAU, distance: int) -> Tensor:
    """b of a distance: what the rotations of a and b leave of one another, as complex numbers."""
    if gau.a is None:
        return torch.tensor(0.0)
    a, b = (torch.view_as_complex(vector.detach().unflatten(0, (-1, 2))) for vector in (gau.a, gau.b))
    theta = 10000.0 ** (-torch.arange(0, P, 2, dtype=torch.float64) / P)
    return (a * b.conj() * torch.polar(torch.ones_like(theta), distance * theta)).real.sum()


def written_out(gau: GAU, x: Tensor) -> Tensor:
    """(L, d_model) for (L, d_model)."""
    u, v, z = F.silu(F.linear(x, gau.in_proj.weight, gau.in_proj.bias)).split(gau._sizes, dim=-1)
    q, k = (z * gau.scale[one] + gau.shift[one] for one in (0, 1))
    ys: list[Tensor] = []
    for t in range(len(x)):
        weights = [F.relu(q[t] @ k[m] / P**0.5 + bias(gau, t - m)) ** 2 / (t + 1) for m in range(t + 1)]
        ys.append(u[t] * sum(weight * v[m] for m, weight in enumerate(weights)))
    return gau.out_proj(torch.stack(ys))


@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize("block", [1024, 3])
def test_it_is_what_the_paper_writes(block: int, positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUERIES", block)
    gau, x = build(positions=positions, bias=True), torch.randn(11, D_MODEL, dtype=torch.float64)
    expected = written_out(gau, x)
    torch.testing.assert_close(gau(x[None])[0][0], expected, rtol=1e-10, atol=1e-12)
    _, state = gau(x[None, :4], return_state=True)
    torch.testing.assert_close(gau(x[None, 4:], state)[0][0], expected[4:], rtol=1e-10, atol=1e-12)


def test_the_answer_keeps_its_size_however_long_the_text() -> None:
    """The same token again and again is answered alike, where nothing tells positions."""
    gau, x = build(positions="none"), torch.randn(1, 1, D_MODEL, dtype=torch.float64)
    y = gau(x.expand(1, 300, -1))[0]
    torch.testing.assert_close(y, y[:, :1].expand_as(y), rtol=1e-10, atol=1e-12)


def test_what_is_not_a_number_stays_in_its_sequence() -> None:
    gau, x = build(), torch.randn(1, 9, D_MODEL, dtype=torch.float64)
    x[0, 2] = torch.nan
    assert gau(x, cu_seqlens=torch.tensor([0, 4, 9]))[0][0, 4:].isfinite().all()


def test_impossible_units_are_refused() -> None:
    with pytest.raises(UserError, match="gau: rope turns pairs: head_dim must be even, got 3"):
        GAUConfig(head_dim=3)
    with pytest.raises(UserError, match="positions must be one of 'none', 'rope', got 'xpos'"):
        GAUConfig(positions="xpos")  # pyright: ignore[reportArgumentType]
