"""Steps that touch some slots of a larger state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def step_in_slots(
    state: Tensor, state_indices: Tensor, out_like: Tensor, step: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Runs `step(held, rows)` on the rows that are not padding and on a copy of their slots, and puts both back.

    The output of padding, a negative index, is zero, and no slot of it is touched. An index past the last slot, which
    only an unchecked call can bring here, stays within the state.
    """
    rows = (state_indices >= 0).nonzero().squeeze(1)
    slots = state_indices[rows].clamp_max(len(state) - 1)
    held = state[slots]
    out = torch.zeros_like(out_like)
    out[rows] = step(held, rows)
    state[slots] = held
    return out
