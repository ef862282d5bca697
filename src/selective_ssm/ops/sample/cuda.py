"""The choice of tokens on NVIDIA GPUs: hands the kernel of kernel.cu its arguments."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from selective_ssm.ops import nvrtc
from selective_ssm.ops.driver import current_stream
from selective_ssm.ops.parameters import Parameters, pointer

_SOURCE = Path(__file__).parent / "kernel.cu"
_THREADS = 1024
_SHARED = 2 * 32 * 8 + 24 + _THREADS * 8
"""Bytes: what warps hand each other, a place, a bin a thread; as in block.cuh."""
_OCTET = 8
_VECTOR_BYTES = 16

_POINTERS = "logits real whole position seen rows weights tokens logprobs"


class _Sample(Parameters):
    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_int64) for name in ("logits_row", "seen_row")),
        *((name, ctypes.c_int) for name in ("vocabulary", "held", "positions")),
    ]


def forward(
    logits: Tensor,
    real: Tensor,
    whole: Tensor,
    position: Tensor,
    seen: Tensor | None,
    rows: Tensor | None,
    draws: bool,
    ranked: int,
    likely: bool,
    logprobs: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the tokens (B,) int64, and their log-probabilities (B,) fp32 or none, of size zero."""
    count, vocabulary = logits.shape
    is_ranked = draws and ranked > 0
    tokens, found = whole.new_empty(count), real.new_empty(count if logprobs else 0)
    weights = real.new_empty(count, -(-vocabulary // _OCTET) * _OCTET) if is_ranked else None
    is_aligned = (logits.data_ptr() | logits.stride(0) * logits.itemsize) % _VECTOR_BYTES == 0
    kernel = _kernel(logits.dtype, draws, is_ranked, seen is not None, logprobs, is_aligned, logits.get_device())
    tensors = (logits, real, whole, position, seen, rows, weights, tokens, found)
    seen_row = 0 if seen is None else seen.stride(0)
    sizes = (logits.stride(0), seen_row, vocabulary, len(real), len(position))
    parameters = _Sample.of(*map(pointer, tensors), *sizes)
    kernel((count, 1, 1), _THREADS, parameters, current_stream(logits.get_device()))
    return tokens, found


@functools.cache
def _kernel(
    dtype: torch.dtype, draws: bool, ranked: bool, penalty: bool, logprobs: bool, aligned: bool, device: int
) -> nvrtc.Kernel:
    defines = (
        ("NUMBER", nvrtc.NUMBER_TYPES[dtype]),
        ("DRAWS", int(draws)),
        ("RANKED", int(ranked)),
        ("PENALTY", int(penalty)),
        ("LOGPROBS", int(logprobs)),
        ("ALIGNED", int(aligned)),
    )
    return nvrtc.kernel(_SOURCE, "sample", defines, device, _SHARED, waits=True)
