"""The state of a whole model, as one value.

Legend: slots, the batch axis of a state: one row a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.layers import State
from selective_ssm.ops import checks

_SHOWN = 4  # positions in a repr


class _Place(NamedTuple):
    """Where a layer's tensor lies in its dtype's buffer."""

    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ModelState:
    """What a model remembers of every sequence: one contiguous buffer (slots, elements) a dtype, and the positions.

    The layers' tensors are views of the buffers, so that a copy, a fork or a move is one operation whatever the number
    of layers. To fork or reorder sequences is to index the slots.

    Attributes:
        position: (slots,) int64, how many tokens each sequence has had.

    Example:
        >>> state = ModelState.from_layers([(torch.zeros(2, 3), torch.ones(2, 4, 5))], torch.tensor([7, 9]))
        >>> state.nbytes
        200
        >>> twice = state.select([1, 1])
        >>> twice.position.tolist(), twice.layers[0][1].shape
        ([9, 9], torch.Size([2, 4, 5]))
    """

    position: Tensor
    _buffers: dict[torch.dtype, Tensor]
    _places: tuple[tuple[_Place, ...], ...]
    _layers: list[State]  # none before they are asked for

    @classmethod
    def from_layers(cls, layers: Iterable[State], position: Tensor) -> ModelState:
        """Lay the layers' states into buffers; differentiable, as concatenation is.

        Args:
            layers: the state of each layer, every tensor with the slots first.
            position: (slots,) int64.
        """
        rows: dict[torch.dtype, list[Tensor]] = {}
        ends: dict[torch.dtype, int] = {}
        places: list[tuple[_Place, ...]] = []
        for state in layers:
            own: list[_Place] = []
            for tensor in state:
                start = ends.get(tensor.dtype, 0)
                size = tensor.shape[1:].numel()
                own.append(_Place(tensor.dtype, start, tuple(tensor.shape[1:])))
                ends[tensor.dtype] = start + size
                rows.setdefault(tensor.dtype, []).append(tensor.reshape(tensor.shape[0], size))
            places.append(tuple(own))
        return cls._of({dtype: torch.cat(row, dim=1) for dtype, row in rows.items()}, tuple(places), position)

    @classmethod
    def _of(
        cls, buffers: dict[torch.dtype, Tensor], places: tuple[tuple[_Place, ...], ...], position: Tensor
    ) -> ModelState:
        state = cls(position, buffers, places, [])
        if any(buffer.requires_grad for buffer in buffers.values()):
            _ = state.layers  # made here, where gradients are recorded
        return state

    @property
    def layers(self) -> tuple[State, ...]:
        """The state of each layer, slots first in each of its tensors: views, made when first asked for."""
        if not self._layers:

            def view(place: _Place) -> Tensor:
                end = place.start + torch.Size(place.shape).numel()
                return self._buffers[place.dtype][:, place.start : end].view(self.slots, *place.shape)

            self._layers[:] = [tuple(map(view, own)) for own in self._places]
        return tuple(self._layers)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._of, (self._buffers, self._places, self.position)  # the layers are views again, not copies

    def __repr__(self) -> str:
        shown = "on meta" if self.position.is_meta else ", ".join(map(str, self.position[:_SHOWN].tolist()))
        more = ", …" if self.slots > _SHOWN and not self.position.is_meta else ""
        return f"ModelState(slots={self.slots}, position=[{shown}{more}], nbytes={self.nbytes})"

    @property
    def slots(self) -> int:
        """Number of sequences."""
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of memory, positions included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All the memory there is: "position" and, by the name of its dtype, each buffer (slots, elements)."""
        named = {str(dtype).removeprefix("torch."): buffer for dtype, buffer in self._buffers.items()}
        return {"position": self.position, **named}

    def of(self, tensors: Mapping[str, Tensor]) -> ModelState:
        """The state in such memory, laid out as this one is: what `tensors` has taken apart, of any number of slots."""
        named = {str(dtype).removeprefix("torch."): dtype for dtype in self._buffers}
        return self._of({dtype: tensors[name] for name, dtype in named.items()}, self._places, tensors["position"])

    def select(self, rows: Tensor | Sequence[int]) -> ModelState:
        """A new state of the given slots, in that order and as often as each is named.

        Args:
            rows: (n,) integer indices, from 0 to slots - 1.

        Raises:
            UserError: rows are not that; on a device other than the CPU their values are not looked at.
        """
        index = self._index(rows)
        buffers = {dtype: buffer.index_select(0, index) for dtype, buffer in self._buffers.items()}
        return self._of(buffers, self._places, self.position.index_select(0, index))

    def _index(self, rows: Tensor | Sequence[int]) -> Tensor:
        index = torch.as_tensor(rows, device=self.position.device)
        if index.ndim != 1:
            raise UserError(f"rows must have one axis, got the shape {tuple(index.shape)}")
        if index.numel() and (index.dtype == torch.bool or index.is_floating_point() or index.is_complex()):
            hint = ": mask.nonzero()[:, 0] are the rows of a mask" if index.dtype == torch.bool else ""
            raise UserError(f"rows must be integers, got {index.dtype}{hint}")
        index = index.to(torch.int64)
        if (outside := checks.out_of_range(index, self.slots)) is not None:
            raise UserError(f"rows must be at least 0 and below slots = {self.slots}, got {outside}")
        return index

    def put(self, rows: Tensor | Sequence[int], other: ModelState) -> None:
        """Overwrite the given slots, in place: slot rows[i] becomes what slot i of the other state is.

        Args:
            rows: (n,) integer indices, from 0 to slots - 1, each at most once.
            other: a state of n slots, of the same model and on the same device.

        Raises:
            UserError: rows are not that, or the other state has not n slots or is of another model.
        """
        index, theirs = self._index(rows), other.tensors()
        self.check(other, slots=index.shape[0])
        for name, tensor in self.tensors().items():
            tensor.index_copy_(0, index, theirs[name])

    def check(self, other: ModelState, *, slots: int) -> None:
        """Refuse what cannot be put into so many slots.

        Raises:
            UserError: the other state has not so many slots or is of another model.
        """
        if other.slots != slots:
            raise UserError(f"a state of {other.slots} slots cannot be put into {slots} rows")
        if other._places != self._places:
            raise UserError("a state of another model cannot be put into this one")

    def clone(self) -> ModelState:
        """A copy with memory of its own: what to take before a step that should not be the last word."""
        buffers = {dtype: buffer.clone() for dtype, buffer in self._buffers.items()}
        return self._of(buffers, self._places, self.position.clone())

    def to(self, device: torch.device | str) -> ModelState:
        """The state on another device; the dtypes stay."""
        buffers = {dtype: buffer.to(device) for dtype, buffer in self._buffers.items()}
        return self._of(buffers, self._places, self.position.to(device))
