"""What is timed on a CPU: operators alone, and whole models.

Legend: B batch, L length, D channels, N state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from selective_ssm.bench.cases import ModelCase, OpCase, WritingCase

Task = Literal["prefill", "decode", "training", "update"]


@dataclass(frozen=True, kw_only=True)
class TaskCase(ModelCase):
    """One thing that a model does.

    Args:
        task: "prefill" reads a prompt, for the logits after it; "decode" writes tokens; "training" takes the gradient
            of the loss; "update" clips it and moves the parameters.
        dtype: of the parameters.
        with_peers: whether peers, and the reference where that takes long, are timed beside it.
    """

    task: Task
    dtype: torch.dtype = torch.float32
    with_peers: bool = False

    @property
    def name(self) -> str:
        """What ``--case`` calls it: PRESET-TASK-BxL, and the dtype if it is not fp32."""
        sizes = "" if self.task == "update" else f"-{self.batch}x{self.length}"
        return f"{self.preset}-{self.task}{sizes}{_dtype_suffix(self.dtype)}"


@dataclass(frozen=True, kw_only=True)
class DtypeCase(OpCase):
    """A call of an op whose dtype is one of several."""

    @property
    def name(self) -> str:
        """What ``--case`` calls it: BxLxDxN, and the dtype if it is not fp32."""
        return super().name + _dtype_suffix(self.dtype)


@dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """A model that writes texts side by side.

    Args:
        preset: its name.
        batches: how many; 1 comes first, with which the others are compared.
    """

    preset: str
    batches: tuple[int, ...] = (1, 8)

    @property
    def name(self) -> str:
        """What ``--case`` calls it."""
        return self.preset


def _dtype_suffix(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else f"-{str(dtype).removeprefix('torch.')}"


def _op(batch: int, length: int, channels: int, states: int) -> DtypeCase:
    return DtypeCase(batch=batch, length=length, channels=channels, states=states)


def _task(task: Task, batch: int, length: int, *, with_peers: bool = False) -> TaskCase:
    return TaskCase(preset="mamba-130m", task=task, batch=batch, length=length, with_peers=with_peers)


_BASE = _op(1, 2048, 1536, 16)

SCAN = (
    _BASE,
    replace(_BASE, dtype=torch.bfloat16),
    _op(4, 512, 1536, 16),
    _op(1, 16384, 256, 16),
    *(replace(_op(*sizes), against_loop=True) for sizes in ((1, 2048, 64, 16), (2, 512, 256, 16))),
)
CONV = (_op(1, 2048, 1536, 3), _op(4, 512, 1536, 3))
STEP = tuple(_op(batch, 1, 1536, 16) for batch in (1, 8))
MODEL = (
    *(_task("prefill", 1, length, with_peers=length == 512) for length in (512, 1024, 2048, 4096)),
    _task("decode", 1, 16, with_peers=True),
    replace(_task("decode", 1, 16), dtype=torch.bfloat16),
    _task("training", 1, 128, with_peers=True),
    _task("training", 4, 512),
    _task("update", 1, 1),
)
DECODE = (DecodeCase(preset="mamba-130m"),)
_WRITING = WritingCase(
    preset="mamba-130m",
    over="batch",
    shapes=tuple((2**power, 512) for power in range(5)),
    new_tokens=128,
    dtype=torch.float32,
    read_at_once=2**11,
    seconds=10.0,
    patience=60.0,
)
GENERATE = (
    _WRITING,
    replace(_WRITING, over="length", shapes=tuple((1, 2**power) for power in range(9, 14)), new_tokens=32),
)
