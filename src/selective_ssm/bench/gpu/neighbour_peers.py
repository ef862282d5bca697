"""Public forms of the mixers: ours, with the sequence part as others have it, on the same parameters.

Legend: B batch, L length, D width, H heads, P head dim, E of values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.bench.contenders import imported
from selective_ssm.bench.gpu import by_fft
from selective_ssm.bench.gpu.attention import attend
from selective_ssm.layers import H3, RWKV, Attention, Hyena, Mamba, Mixer, Plain, RetNet
from selective_ssm.layers.mixer import in_float32

Form = Callable[[Tensor], Tensor]
"""Maps (B, L, D) to the same shape."""

_NOTHING = -1e38  # the logarithm of no weight, in RWKV's sums


def public_forms(mixer: Mixer, x: Tensor) -> Mapping[str, Form | None]:
    """The public forms of a mixer for inputs like x, by peer; None where its package is not installed.

    They know what `cases.NEIGHBOURS` has, and no other settings of these mixers.
    """
    match mixer:
        case Attention():
            return {"sdpa": partial(_attention, mixer, _turns(mixer.head_dim, x))}
        case RetNet():
            fla = imported("fla.ops.retention")
            turns = _turns(mixer.head_dim, x)
            return {"fla": fla and partial(_retnet, mixer, turns, fla.chunk_retention)}
        case RWKV():
            fla = imported("fla.ops.rwkv4")
            return {"fla": fla and partial(_rwkv, mixer, fla.fused_recurrent_rwkv4)}
        case Mamba() | Plain() | H3() | Hyena():
            form = by_fft.form(mixer)
            return {"torch": form} if form else {}
        case _:
            return {}


def _attention(mixer: Attention, turns: Tensor, x: Tensor) -> Tensor:
    """As many key heads as heads, turned; the kernel is torch's, whichever is allowed."""
    q, k, v = mixer.in_proj(x).unflatten(-1, (3, -1, mixer.head_dim)).unbind(-3)
    q, k, v = (part.transpose(1, 2) for part in (_turned(q, turns), _turned(k, turns), v))
    return mixer.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))


def _retnet(mixer: RetNet, turns: Tensor, chunk_retention: Any, x: Tensor) -> Tensor:
    """`chunk_retention` of flash-linear-attention, which has the decays and the scale of ours."""
    heads, wide = mixer.config.n_heads, mixer.norm.num_channels
    narrow = heads * mixer.head_dim
    q, k, v, gate = mixer.in_proj(x).split((narrow, narrow, wide, wide), dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))
    y, _ = chunk_retention(_turned(q, turns), _turned(k, turns), v)
    y = mixer.norm(y.flatten(-2).flatten(0, 1)).view_as(gate)
    return mixer.out_proj(y.to(gate.dtype) * F.silu(gate))


def _rwkv(mixer: RWKV, fused_recurrent_rwkv4: Any, x: Tensor) -> Tensor:
    """`fused_recurrent_rwkv4` of flash-linear-attention, in fp32 as the wkv kernel of the paper's code."""
    previous = F.pad(x, (0, 0, 1, -1))
    r, k, v = (
        linear(torch.lerp(previous, x, mix.to(x.dtype)))
        for mix, linear in ((mixer.mix_r, mixer.r_proj), (mixer.mix_k, mixer.k_proj), (mixer.mix_v, mixer.v_proj))
    )
    k, v = in_float32(k), in_float32(v)
    before = k.new_zeros(len(k), 3, 1, k.shape[-1])
    before[:, 2] = _NOTHING
    y, _ = fused_recurrent_rwkv4(mixer.fade_log, mixer.bonus, k, v, before)
    return mixer.out_proj(torch.sigmoid(r) * y.to(r.dtype))


def _turns(head_dim: int, x: Tensor) -> Tensor:
    """RoPE's rotations as complex numbers (L, 1, P / 2), which is all that a model needs to make of positions, once."""
    pairs = torch.arange(0, head_dim, 2, device=x.device, dtype=torch.float64)
    place = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)
    angles = place[:, None, None] * 10000.0 ** (-pairs / head_dim)
    turns = torch.polar(torch.ones_like(angles), angles)
    return turns if x.dtype == torch.float64 else turns.to(torch.complex64)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """(B, L, H, P) times its rotations."""
    pairs = torch.view_as_complex(in_float32(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
