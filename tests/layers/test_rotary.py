"""Rotations and decays: what they do to a product depends on the distance alone, however far the text has come."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from selective_ssm.layers.rotary import rotate, xpos_decay

WIDTH = 8


def test_angles_are_those_of_the_paper() -> None:
    """R_n x, written out pair by pair."""
    x = torch.randn(1, 3, 2, WIDTH, dtype=torch.float64)
    positions = torch.tensor([[5, 0, 77]])
    turned = rotate(x, positions, base=100.0)
    for index, n in enumerate(positions[0].tolist()):
        for i in range(WIDTH // 2):
            angle = n * 100.0 ** (-2 * i / WIDTH)
            pair = x[0, index, :, 2 * i] + 1j * x[0, index, :, 2 * i + 1]
            expected = torch.view_as_real(pair * complex(math.cos(angle), math.sin(angle)))
            torch.testing.assert_close(turned[0, index, :, 2 * i : 2 * i + 2], expected, rtol=1e-13, atol=1e-13)


def test_where_there_are_no_complex_numbers_angles_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that begin at an odd place of their memory are no pairs to torch; nor are any to its compiler."""
    x, positions = torch.randn(1, 3, 2, WIDTH), torch.tensor([[5, 0, 77]])
    expected = rotate(x, positions)
    odd = torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x)
    torch.testing.assert_close(rotate(odd, positions), expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, positions), expected)


def test_decays_are_those_of_the_paper() -> None:
    x = torch.ones(1, 2, 1, WIDTH, dtype=torch.float64)
    decays = xpos_decay(x, torch.tensor([[3, -600]]))[0, :, 0]
    for i in range(WIDTH // 2):
        zeta = (2 * i / WIDTH + 0.4) / 1.4
        for offset, row in zip((3, -600), decays, strict=True):
            assert row[2 * i : 2 * i + 2].tolist() == pytest.approx([zeta ** (offset / 512)] * 2, rel=1e-12)


@pytest.mark.parametrize("fades", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_products_depend_on_the_distance_alone(dtype: torch.dtype, bound: float, fades: bool) -> None:
    """Of 40 queries and keys at the beginning, and a million tokens later."""
    q, k = torch.randn(2, 1, 40, 1, WIDTH, dtype=dtype)

    def products(start: int) -> Tensor:
        positions = start + torch.arange(40)[None]
        queries, keys = rotate(q, positions), rotate(k, positions)
        if fades:
            queries, keys = xpos_decay(queries, positions - start), xpos_decay(keys, start - positions)
        return (queries[0, :, 0] @ keys[0, :, 0].T).tril()

    near, far = products(0), products(10**6)
    assert (far - near).abs().max() <= bound * near.abs().max()


def test_the_dtype_stays() -> None:
    x = torch.randn(1, 2, 1, WIDTH, dtype=torch.bfloat16)
    assert rotate(x, torch.tensor([[0, 1]])).dtype == torch.bfloat16
    assert xpos_decay(x, torch.tensor([[0, 1]])).dtype == torch.bfloat16
