"""One token more of RWKV's average, in plain torch, which never waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from selective_ssm.ops.slots import Slots
from selective_ssm.ops.wkv.sums import Sums


def wkv_step(
    k: Tensor, v: Tensor, fade: Tensor, bonus: Tensor, state: Tensor, state_indices: Tensor | None = None
) -> Tensor:
    """One token a row: as `wkv`, with k, v and the result (B, D); the state (slots, 3, D) is updated in place."""
    slots = Slots.named(state_indices, len(k), state)
    before, token = Sums(*slots.take(state).unbind(1)), Sums.of(k.to(state.dtype), v.to(state.dtype))
    y = before.and_of(token.faded(-bonus)).mean()
    slots.put(state, torch.stack(before.faded(fade).and_of(token), 1))
    return y.to(k.dtype)
