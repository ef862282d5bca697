"""RetNet's retention: the paper's equations, written out with complex numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.layers import RetNet, RetNetConfig

D_MODEL, H, P = 12, 2, 6


def build(**config: object) -> RetNet:
    retnet = RetNet(RetNetConfig(n_heads=H, **config), D_MODEL).double()  # pyright: ignore[reportArgumentType]
    for parameter in retnet.norm.parameters():
        torch.nn.init.normal_(parameter)
    return retnet


def turned(x: Tensor) -> Tensor:
    """X_n e^{i n θ}, neighbours being real and imaginary parts: (B, L, H, P / 2)."""
    theta = 10000.0 ** (-torch.arange(0, P, 2, dtype=torch.float64) / P)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * theta
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)


def written_out(retnet: RetNet, x: Tensor, *, normalized: bool) -> Tensor:
    """Equations 5 and 8: parallel; with the normalisation of scores of section 2.3 or without."""
    q, k, v, gate = (x @ retnet.in_proj.weight.T).split([H * P, H * P, 2 * H * P, 2 * H * P], dim=-1)
    q, k = (turned(part.unflatten(-1, (H, P))) for part in (q, k))
    n = torch.arange(x.shape[1], dtype=torch.float64)
    heads: list[Tensor] = []
    for head in range(H):
        D = ((1 - 2.0 ** (-5 - head)) ** (n[:, None] - n)).tril()
        R = (q[:, :, head] @ k[:, :, head].mH).real / P**0.5
        if normalized:
            R = R * D / D.sum(1, keepdim=True).sqrt()
            R = R / R.sum(-1, keepdim=True).abs().clamp_min(1)
        else:
            R = R * D
        heads.append(R @ v.unflatten(-1, (H, -1))[:, :, head])
    y = torch.stack(heads, 2)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + retnet.norm.eps).sqrt()
    return (F.silu(gate) * (y.flatten(2) * retnet.norm.weight + retnet.norm.bias)) @ retnet.out_proj.weight.T


@pytest.mark.parametrize("chunk", [4, 128])
def test_it_is_what_the_paper_writes(chunk: int) -> None:
    retnet, x = build(chunk=chunk), torch.randn(2, 11, D_MODEL, dtype=torch.float64)
    torch.testing.assert_close(retnet(x)[0], written_out(retnet, x, normalized=False), rtol=1e-9, atol=1e-11)


def test_the_norm_undoes_what_is_left_out() -> None:
    retnet, x = build(), torch.randn(2, 11, D_MODEL, dtype=torch.float64)
    retnet.norm.eps = 0.0
    torch.testing.assert_close(retnet(x)[0], written_out(retnet, x, normalized=True), rtol=1e-8, atol=1e-10)


def test_names_in_the_state_dict() -> None:
    assert set(build().state_dict()) == {"in_proj.weight", "norm.weight", "norm.bias", "out_proj.weight"}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"n_heads": 5}, "retnet: n_heads must divide d_model = 12 or head_dim be given, got 5"),
        ({"n_heads": 4}, "retnet: rotations turn pairs: head_dim must be even, got 3"),
        ({"chunk": 0}, "retnet: chunk must be greater than 0, got 0"),
    ],
)
def test_impossible_retentions_are_refused(config: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        RetNet(RetNetConfig(**config), D_MODEL)
