"""What is known of tensors without their addresses and values: what is checked, and what kernels are prepared for.

A step takes a few microseconds, so that what follows from its tensors' layouts is found once and remembered by them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
"""Shape, strides, dtype and device."""
Layouts = tuple[Any, ...]
"""A Layout or None for each of some tensors."""


def layouts_of(*tensors: Tensor | None) -> Layouts:
    """The layouts of tensors, None for None.

    Example:
        >>> layouts_of(None, torch.zeros(2, 3))
        (None, (torch.Size([2, 3]), (3, 1), torch.float32, device(type='cpu')))
    """
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors])
