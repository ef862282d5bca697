"""The MLP's shapes; its maths sits the exam."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from selective_ssm.layers import MLP, MLPConfig


@pytest.mark.parametrize(("d_model", "hidden"), [(768, 2048), (1000, 2688), (8, 128)])
def test_hidden_width_is_rounded_up(d_model: int, hidden: int) -> None:
    mlp = MLP(MLPConfig(), d_model)
    assert mlp.in_proj.out_features == 2 * hidden
    assert mlp.out_proj.in_features == hidden


def test_gated_and_plain_values() -> None:
    x = torch.randn(2, 3, 8)
    gated = MLP(MLPConfig(multiple_of=2), d_model=8)
    u, v = gated.in_proj(x).split(22, dim=-1)
    torch.testing.assert_close(gated(x)[0], gated.out_proj(u * F.silu(v)))
    plain = MLP(MLPConfig(expansion=4, activation="gelu", gated=False), d_model=8)
    torch.testing.assert_close(plain(x)[0], plain.out_proj(F.gelu(plain.in_proj(x))))
