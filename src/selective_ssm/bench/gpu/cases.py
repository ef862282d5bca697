"""What is timed on a GPU: operators alone, whole blocks, whole models.

Legend: B batch, L length, D channels, N state, K conv width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from selective_ssm.bench.cases import ModelCase, OpCase


@dataclass(frozen=True, kw_only=True)
class LengthCase:
    """So many tokens of attention, and of a scan of as wide a model, in rows of one length.

    Args:
        length: L.
        batch: B.
        d_model: of the attention; the scan has twice as many channels, as in a Mamba block.
        head_dim: of the attention.
    """

    length: int
    batch: int
    d_model: int = 1024
    head_dim: int = 64

    @property
    def name(self) -> str:
        """What ``--case`` calls it."""
        return f"L{self.length}"


@dataclass(frozen=True, kw_only=True)
class CallCase:
    """A case without sizes to choose.

    Args:
        name: what ``--case`` calls it.
        scan: the tensors.
    """

    name: str
    scan: OpCase


def _case(batch: int, length: int, channels: int, states: int) -> OpCase:
    return OpCase(batch=batch, length=length, channels=channels, states=states, dtype=torch.bfloat16)


_TINY = _case(1, 16, 64, 16)
_TOKENS = 2**14
_BASE = _case(8, 2048, 2048, 16)

SCAN = (
    _BASE,
    _case(2, 8192, 4096, 16),
    _case(1, 131072, 2048, 16),
    _case(1, 2048, 4096, 16),
    _case(64, 1024, 3072, 16),
    replace(_case(1, _TOKENS, 2048, 16), sequences=64),
    replace(_BASE, reverse=True),
    replace(_BASE, discretization="zoh"),
)
CONV = (_case(8, 4096, 2048, 3),)
NORM = (_case(1, _TOKENS, 2048, 0), _case(1, _TOKENS, 1024, 0))
STEP = tuple(_case(batch, 1, 4096, 16) for batch in (1, 16, 128))
HOST = (CallCase(name="tiny", scan=_TINY),)
FIRST_CALL = (CallCase(name="scan", scan=_TINY),)
BLOCKS = tuple(LengthCase(length=length, batch=_TOKENS // length) for length in (2048, 4096, 8192, 16384))
LENGTHS = tuple(LengthCase(length=2**power, batch=max(1, _TOKENS // 2**power)) for power in range(9, 20))
MODEL = (
    ModelCase(preset="mamba-1.4b", batch=4, length=2048),
    ModelCase(preset="mamba-370m", batch=8, length=2048),
    ModelCase(preset="mamba-130m", batch=8, length=2048),
)
