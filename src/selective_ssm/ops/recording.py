"""A function's launches of CPU kernels, written down once to be run again without Python.

The function must compute with kernels alone: what it makes of tensors that vary, its arguments, states and whatever a
kernel wrote, must be allocations, views and launches. What torch computes from other tensors, such as exp of a
parameter, is a constant of the recording. All else makes the function one that cannot be recorded; it runs as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selective_ssm.ops import native
from selective_ssm.ops.registration import implementation_of

_aten = torch.ops.aten
ALLOCATE = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
"""They read the sizes of a tensor at most, and return memory that others write to."""
_FILL = {_aten.zeros_like.default, _aten.new_zeros.default, _aten.ones_like.default, _aten.new_ones.default}
"""They too read the sizes of a tensor, and nothing in it."""


class Recording(NamedTuple):
    """What to run again, in the same memory."""

    launches: native.Launches
    result: Tensor
    memory: list[Tensor]  # all that the kernels read or write and that was made meanwhile
    sources: list[Tensor]  # what constants were computed from: when one is written to, the recording is of no use

    def run(self) -> Tensor:
        """The function's result for what its arguments hold now."""
        self.launches.run()
        return self.result


def record(function: Callable[[], Tensor], varying: Iterable[Tensor]) -> tuple[Tensor, Recording | None]:
    """Run a function and write down what it launches.

    Args:
        function: what to run, once. It must not let Python look into tensors that vary.
        varying: the tensors whose contents will differ from run to run.

    Returns:
        What the function returned, in memory that a run of the recording writes to again; and the recording, or None
        where there can be none.
    """
    mode = _Recorder(varying)
    with native.noted() as launches, mode:
        result = function()
    if not mode.is_whole or not launches:
        return result, None
    return result, Recording(native.Launches(launches), result, mode.memory, mode.sources)


class _Recorder(TorchDispatchMode):
    """Sees every operator of torch, those within operators of ours too, and keeps what they return."""

    def __init__(self, varying: Iterable[Tensor]) -> None:
        super().__init__()
        self.memory: list[Tensor] = []
        self.sources: list[Tensor] = []
        self.is_whole = True
        self._varying = {_place(x) for x in varying}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        implementation = implementation_of(func)
        if implementation is not None:
            with self:
                return implementation(*args, **kwargs)
        result = func(*args, **kwargs)
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        returned = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.memory += returned
        if func in ALLOCATE:
            self._varying.update(map(_place, returned))
        elif torch.Tag.nondeterministic_seeded in func.tags:
            self.is_whole = False
        elif func not in _FILL and any(map(self._varies, taken)):
            is_view = bool(returned) and all(map(self._varies, returned)) and not func._schema.is_mutable
            self.is_whole &= is_view
        elif func not in _FILL:
            self.sources += [x for x in taken if _place(x) not in self._made]
            self._made.update({_place(x) for x in returned} - {_place(x) for x in taken})
        return result

    def _varies(self, x: Tensor) -> bool:
        return _place(x) in self._varying


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
