"""What the scan is measured against: one step after the other, and autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scan_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """The selective scan as one writes it down first; arguments and result as of `ops.selective_scan`."""
    delta = F.softplus(delta + delta_bias)
    state = u.new_zeros(u.shape[0], *A.shape)
    outputs: list[Tensor] = []
    for u_t, delta_t, b_t, c_t in zip(u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        decay = torch.exp(delta_t[..., None] * A)
        state = decay * state + (delta_t * u_t)[..., None] * b_t[:, None]
        outputs.append((state * c_t[:, None]).sum(-1))
    return (torch.stack(outputs, dim=1) + D * u) * F.silu(z)


@torch.no_grad()
def scan_by_doubling(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """The selective scan as a framework's parallel scan: all states in memory, log2(L) passes; no gradient."""
    delta = F.softplus(delta + delta_bias)
    decay = torch.exp(delta[..., None] * A)
    state = (delta * u)[..., None] * B[:, :, None]
    reach = 1
    while reach < u.shape[1]:
        state[:, reach:] += decay[:, reach:] * state[:, :-reach]
        decay[:, reach:] = decay[:, reach:] * decay[:, :-reach]
        reach *= 2
    y = torch.einsum("bldn,bln->bld", state, C.to(state.dtype))
    return ((y + D * u) * F.silu(z)).to(u.dtype)
