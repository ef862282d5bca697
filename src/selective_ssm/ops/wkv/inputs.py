"""The arguments of RWKV's average by their names, as its backends are handed them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """What `op.wkv` takes; all but the last can be differentiated."""

    k: Tensor
    v: Tensor
    fade: Tensor
    bonus: Tensor
    state: Tensor
    cu_seqlens: Tensor | None


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Those of k, v, fade, bonus and state, in their dtypes."""
