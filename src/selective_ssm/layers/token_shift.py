"""The token before each token: what RWKV's layers mix every input with.

Legend: B batch, L length, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selective_ssm.ops import causal_conv1d, causal_conv1d_step


def shifted(
    x: Tensor, last: Tensor | None, *, cu_seqlens: Tensor | None, return_state: bool
) -> tuple[Tensor, Tensor | None]:
    """The input before each of x (B, L, D), and the last one (B, D, 1); `last` came before the first, or nothing (0).

    It is a causal convolution that sees two inputs and takes the earlier one.

    Example:
        >>> shifted(torch.ones(1, 3, 1), None, cu_seqlens=None, return_state=False)[0].flatten().tolist()
        [0.0, 1.0, 1.0]
    """
    result = causal_conv1d(
        x.contiguous(),
        _earlier(x),
        activation=None,
        initial_state=last,
        cu_seqlens=cu_seqlens,
        return_final_state=return_state,
    )
    return result if isinstance(result, tuple) else (result, None)


def shifted_step(x: Tensor, last: Tensor, *, state_indices: Tensor | None) -> Tensor:
    """The input before each of x (B, D); x takes its place in `last` (slots, D, 1)."""
    return causal_conv1d_step(last, x, _earlier(x), activation=None, state_indices=state_indices)


def _earlier(x: Tensor) -> Tensor:
    """A convolution's weight, (D, 2): 1 for the earlier input, 0 for the other."""
    return torch.eye(1, 2, device=x.device, dtype=x.dtype).repeat(x.shape[-1], 1)
