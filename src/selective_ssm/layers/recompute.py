"""What is kept of a forward pass for the backward one: memory against time."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from selective_ssm.ops import EXPENSIVE

Recompute = Literal["none", "selective", "full"]


def recomputing(module: nn.Module, what: Recompute, *arguments: Any, **options: Any) -> Any:
    """Call a module, and keep for its backward pass no more than is asked for; the gradients are the same.

    Args:
        module: what to call.
        what: "none" keeps everything that the backward pass reads; "full" keeps the arguments alone and runs the
            module a second time; "selective" keeps the results of scans, and of RWKV's averages, too: all else runs
            again.
        arguments: of the call.
        options: of the call.

    Returns:
        What the module returns.
    """
    if what == "none" or not torch.is_grad_enabled():
        return module(*arguments, **options)
    selective = partial(create_selective_checkpoint_contexts, list(EXPENSIVE))
    context = selective if what == "selective" else noop_context_fn
    draws = any(isinstance(one, nn.Dropout) for one in module.modules())  # an adapter's; mixers have none
    return checkpoint(module, *arguments, use_reentrant=False, preserve_rng_state=draws, context_fn=context, **options)
