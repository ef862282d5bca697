"""H3 is its two SSMs, written out token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from selective_ssm.errors import UserError
from selective_ssm.layers import (
    H3,
    H3Config,
    HyenaFilterConfig,
    MambaConfig,
    MixerConfig,
    PlainConfig,
    S4Config,
    S4DConfig,
    S6Config,
    SSMConfig,
    build_mixer,
)


def test_h3_is_a_shift_and_a_diagonal_ssm_between_two_products() -> None:
    """Section 3.1 of the paper, with matrices: the shift moves its state down by one, e_1 lets the input in."""
    width, memory = 3, 4
    block = H3(H3Config(d_shift=memory, ssm=S4DConfig(d_state=6)), d_model=width).double()
    x = torch.randn(20, width, dtype=torch.float64)
    q, k, v = F.linear(x, block.in_proj.weight, block.in_proj.bias).chunk(3, dim=-1)
    shift = torch.diag(torch.ones(memory - 1, dtype=torch.float64), -1)
    first = torch.zeros(memory, 1, dtype=torch.float64)
    first[0] = 1
    C_shift = block.shift.conv1d.weight.flip(1)
    ssm = block.ssm
    A = torch.complex(-ssm.A_log.exp(), ssm.A_imag)
    A_bar = torch.exp(ssm.log_dt.exp()[:, None] * A)
    C = torch.complex(ssm.C[:, ::2], ssm.C[:, 1::2])
    remembered = torch.zeros(memory, width, dtype=torch.float64)
    h = torch.zeros_like(A)
    ys = []
    for q_t, k_t, v_t in zip(q, k, v, strict=True):
        remembered = shift @ remembered + first * k_t
        product = (C_shift.T * remembered).sum(0) * v_t
        h = A_bar * h + (A_bar - 1) / A * product[:, None]
        ys.append(q_t * (2 * (C * h).sum(1).real + ssm.D * product))
    expected = F.linear(torch.stack(ys), block.out_proj.weight, block.out_proj.bias)
    torch.testing.assert_close(block(x[None])[0][0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("block", [H3Config, MambaConfig, PlainConfig])
@pytest.mark.parametrize("ssm", [S4Config(d_state=4), S4DConfig(d_state=4), HyenaFilterConfig(), S6Config(d_state=4)])
def test_blocks_and_ssms_compose(block: type[MixerConfig], ssm: SSMConfig) -> None:
    """Each of the paper's Table 1 is a config; a prompt and a step from its state are one longer prompt."""
    mixer = build_mixer(block(ssm=ssm), 4).double()
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    state = mixer.init_state(2, x.device, x.dtype, max_length=9)
    _, state = mixer(x[:, :8], state, return_state=True)
    with torch.no_grad():
        last, _ = mixer.step(x[:, 8], state)
    torch.testing.assert_close(last, mixer(x)[0][:, 8], rtol=1e-9, atol=1e-11)


def test_a_shift_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="h3: d_shift must be greater than 0, got 0"):
        H3Config(d_shift=0)
