"""The causal depthwise convolution in plain torch: the specification that every kernel is held against.

Legend: B batch, L length, D channels, K width, S sequences in a row, H = K - 1 inputs of history.

Each sequence is read as its history followed by its tokens, so that the output at position p is the sum over k of
weight_k times entry p + k. All histories and the row lie in one pool (B, S H + L, D), of which entries are gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.ops import sequences
from selective_ssm.ops.causal_conv1d.inputs import Inputs, Options, StepInputs
from selective_ssm.ops.layouts import Layouts
from selective_ssm.ops.sequences import Order
from selective_ssm.ops.slots import Slots


def forward(inputs: Inputs, options: Options, save: bool) -> tuple[Tensor, Tensor, None]:
    """Returns out (B, L, D) and the final state (B or S, D, K - 1); `backward` needs nothing but the inputs."""
    x = inputs.x
    pool = _Pool.of(inputs, options)
    values = pool.fill(inputs)
    out = _activate(_convolve(values, pool, inputs), options.activation).to(x.dtype)
    final = values.index_select(1, pool.final_slots().flatten())
    return out, pool.as_states(final).to(x.dtype), None


def saved_shape(inputs: Inputs) -> tuple[int, ...]:
    """Nothing is kept."""
    return (0,)


def backward(
    d_out: Tensor, d_final: Tensor | None, saved: Tensor, inputs: Inputs, options: Options
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and initial_state, in their dtypes; None where there is no input."""
    x, weight, bias, initial_state, _ = inputs
    pool = _Pool.of(inputs, options)
    values = pool.fill(inputs)
    d_pre = d_out.to(values.dtype)
    if options.activation == "silu":
        pre = _convolve(values, pool, inputs)
        gate = pre.sigmoid()
        d_pre = d_pre * gate * (1 + pre * (1 - gate))
    width = weight.shape[1]
    taps = [(d_pre * pool.read(values, k)).sum((0, 1)) for k in range(width)]
    d_values = torch.zeros_like(values)
    for k in range(width):
        pool.add_read(d_values, k, d_pre, weight[:, k].to(values.dtype))
    if d_final is not None:
        d_values.index_add_(1, pool.final_slots().flatten(), pool.as_entries(d_final.to(values.dtype)))
    histories = d_values.shape[1] - x.shape[1]
    return (
        d_values[:, histories:].to(x.dtype),
        torch.stack(taps, -1).to(weight.dtype),
        None if bias is None else d_pre.sum((0, 1)).to(bias.dtype),
        None if initial_state is None else pool.as_states(d_values[:, :histories]).to(initial_state.dtype),
    )


def step(
    state: Tensor,
    inputs: StepInputs,
    options: Options,
    state_indices: Tensor | None,
    layouts: Layouts | None = None,
) -> Tensor:
    """One token: updates `state` (slots, D, K - 1) in place and returns out (B, D)."""
    slots = Slots.of(state_indices, state)
    held = slots.take(state)
    out = _step(held, inputs, options)
    slots.put(state, held)
    return slots.blank(out)


def _step(state: Tensor, inputs: StepInputs, options: Options) -> Tensor:
    x, weight, bias = inputs
    wide = _wide(x)
    entries = torch.cat([state.to(wide), x.to(wide).unsqueeze(-1)], -1)
    out = (entries * weight.to(wide)).sum(-1)
    if state.shape[-1] > 0:
        state.copy_(entries[..., 1:])
    return _activate(out if bias is None else out + bias.to(wide), options.activation).to(x.dtype)


@dataclass(frozen=True)
class _Pool:
    """Where the entries of each sequence lie in the pool: S histories of H entries, then the row."""

    order: Order
    packed: bool
    length: int
    history: int

    @classmethod
    def of(cls, inputs: Inputs, options: Options) -> _Pool:
        x, weight, _, _, cu_seqlens = inputs
        offsets = sequences.boundaries(x.shape[1], cu_seqlens, x.device)
        return cls(Order(offsets, options.reverse), cu_seqlens is not None, x.shape[1], weight.shape[1] - 1)

    @property
    def in_order(self) -> bool:
        """Whether the pool is one sequence in the order in which it is visited, so that a view serves for an index."""
        return not self.packed and not self.order.reverse

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """The sequence and the position of each token, which every tap asks for."""
        return self.order.find(self.length)

    def fill(self, inputs: Inputs) -> Tensor:
        """(B, S H + L, D) the pool's values; a history that is not given is zero."""
        x = inputs.x.to(_wide(inputs.x))
        if inputs.initial_state is None:
            history = x.new_zeros(x.shape[0], len(self.order.lengths) * self.history, x.shape[2])
        else:
            history = self.as_entries(inputs.initial_state.to(x.dtype))
        return torch.cat([history, x], 1)

    def read(self, values: Tensor, k: int) -> Tensor:
        """(B, L, D) the entry that each token's output reads with weight k."""
        if self.in_order:
            return values[:, k : k + self.length]
        sequence, position = self.places
        return values.index_select(1, self._slot(sequence, position + k))

    def add_read(self, d_values: Tensor, k: int, d_out: Tensor, weight: Tensor) -> None:
        """The adjoint of `read`: adds weight d_out, (B, L, D), to the gradients of the entries that were read."""
        if self.in_order:
            d_values[:, k : k + self.length].addcmul_(d_out, weight)
            return
        reader, has_reader = self._readers(k)
        gathered = d_out.index_select(1, reader).masked_fill_(~has_reader[:, None], 0)
        d_values.addcmul_(gathered, weight)

    def final_slots(self) -> Tensor:
        """(S, H) where each sequence's last H entries lie."""
        sequence = torch.arange(len(self.order.lengths), device=self.order.offsets.device)[:, None]
        entry = self.order.lengths[:, None] + torch.arange(self.history, device=sequence.device)
        return self._slot(sequence, entry)

    def as_entries(self, states: Tensor) -> Tensor:
        """(B or S, D, H) -> (B, S H, D)."""
        entries = states.transpose(1, 2)
        return entries.flatten(0, 1).unsqueeze(0) if self.packed else entries

    def as_states(self, entries: Tensor) -> Tensor:
        """(B, S H, D) -> (B or S, D, H)."""
        states = entries.squeeze(0).unflatten(0, (len(self.order.lengths), self.history)) if self.packed else entries
        return states.transpose(1, 2).contiguous()

    def _readers(self, k: int) -> tuple[Tensor, Tensor]:
        """Two (S H + L,): the token whose output reads each entry with weight k, and whether there is one."""
        histories = torch.arange(len(self.order.lengths) * self.history, device=self.order.offsets.device)
        sequence, position = self.places
        sequence = torch.cat([histories // max(self.history, 1), sequence])
        position = torch.cat([histories % max(self.history, 1), position + self.history]) - k
        token = self.order.token(sequence, position).clamp(0, self.length - 1)
        return token, (position >= 0) & (position < self.order.lengths[sequence])

    def _slot(self, sequence: Tensor, entry: Tensor) -> Tensor:
        histories = len(self.order.lengths) * self.history
        token = self.order.token(sequence, entry - self.history).clamp(0, self.length - 1)
        return torch.where(entry < self.history, sequence * self.history + entry, histories + token)


def _convolve(values: Tensor, pool: _Pool, inputs: Inputs) -> Tensor:
    """Bias + sum_k weight_k entry_{p + k}."""
    weights = inputs.weight.to(values.dtype).unbind(1)
    out = pool.read(values, 0) * weights[0]
    for k, weight in enumerate(weights[1:], 1):
        out.addcmul_(pool.read(values, k), weight)
    return out if inputs.bias is None else out.add_(inputs.bias.to(values.dtype))


def _activate(x: Tensor, activation: str | None) -> Tensor:
    return F.silu(x) if activation == "silu" else x


def _wide(x: Tensor) -> torch.dtype:
    """The precision of the computation: fp32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
