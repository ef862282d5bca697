"""Norms compute in the wider dtype and answer in that of their weight."""

from __future__ import annotations

import pytest
import torch

from selective_ssm.layers.norm import build_norm


@pytest.mark.parametrize("name", ["rms", "layer"])
def test_values(name: str) -> None:
    norm = build_norm(name, 7, eps=1e-3).double()
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(3, 7, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True) if name == "layer" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("name", ["rms", "layer"])
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
def test_dtypes(name: str, weight: torch.dtype, stream: torch.dtype) -> None:
    norm = build_norm(name, 64, eps=1e-5).to(weight)
    x = torch.randn(2, 64).to(stream)
    y = norm(x)
    assert y.dtype == weight
    assert torch.equal(y, norm.float()(x.float()).to(weight))


@pytest.mark.parametrize("name", ["rms", "layer"])
def test_an_add_and_the_norm_of_the_sum(name: str) -> None:
    """A first branch, added to a stream of nothing, is normalised as it came."""
    norm, x = build_norm(name, 7, eps=1e-3).double(), torch.randn(3, 7, dtype=torch.float64)
    for stream in (torch.randn_like(x), torch.zeros_like(x)):
        y, total = norm.add(stream, x)
        assert torch.equal(total, stream + x)
        torch.testing.assert_close(y, norm(total))
