"""Buffers between guards: what is read too early or beside a tensor is NaN, and what is written beside it shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

GUARD = 1024
"""Bytes on either side."""
_NAN = 0xFF  # repeated, a NaN in every number format


class Guards:
    """Makes buffers, and remembers where their guards are."""

    def __init__(self) -> None:
        self._guards: list[Tensor] = []

    def buffer(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
        """A tensor of NaNs, with nothing but NaNs around it."""
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0
        used = span * dtype.itemsize
        whole = torch.full((GUARD + -(-used // 16) * 16 + GUARD,), _NAN, dtype=torch.uint8, device=device)
        self._guards += [whole[:GUARD], whole[GUARD + used :][:GUARD]]
        inside = whole[GUARD : GUARD + used].view(dtype)
        return inside.as_strided(shape, strides, inside.storage_offset())

    def copy(self, x: Tensor, device: Any) -> Tensor:
        """A tensor as it lies in memory."""
        return self.buffer(tuple(x.shape), x.stride(), x.dtype, device).copy_(x)

    def intact(self) -> bool:
        """Whether nothing has been written beside a buffer; waits for the device."""
        return not self._guards or bool(torch.stack([guard.eq(_NAN).all() for guard in self._guards]).all())

    @contextlib.contextmanager
    def allocating(self) -> Iterator[None]:
        """What Python code allocates in here lies between guards."""
        patched = [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")]
        originals = [(owner, name, getattr(owner, name)) for owner, name in patched]

        def guarded(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def allocated(*arguments: Any, **options: Any) -> Tensor:
                x = allocate(*arguments, **options)
                return self.buffer(tuple(x.shape), x.stride(), x.dtype, x.device) if x.is_floating_point() else x

            return allocated

        for owner, name, allocate in originals:
            setattr(owner, name, guarded(allocate))
        try:
            yield
        finally:
            for owner, name, allocate in originals:
                setattr(owner, name, allocate)
