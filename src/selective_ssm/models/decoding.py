"""Steps without Python: what a step of a model launches on a CPU is recorded, and run again for the tokens after.

A step of the 130M model reads its weights in a few milliseconds, and Python would take as long to ask for it. A
recording holds for one state, in whose memory it works, and for as long as nothing that it was made from has changed:
neither what parameters are, nor what was computed from one, nor a module, a hook, or how work is shared among threads.
"""

# pyright: reportPrivateUsage=false
# What a module consists of is looked through thousands of times a second: past its public functions, which make lists.

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from selective_ssm.layers import State
from selective_ssm.models.fingerprint import of_others
from selective_ssm.models.state import ModelState
from selective_ssm.ops.recording import Recording, record

Advance = Callable[[Tensor, Sequence[State], "Tensor | None"], Tensor]
"""A step: (x, states, state_indices) -> result; the states are updated in place."""


class Decoder:
    """Runs a model's steps. It holds nothing that a copy of the model, or one on disk, would need.

    The first step from a state runs as ever, the second is recorded, those after run from the recording.
    """

    def __init__(self) -> None:
        self._steps: WeakKeyDictionary[ModelState, dict[Any, _Step | None]] = WeakKeyDictionary()

    def __deepcopy__(self, memo: Any) -> Decoder:
        return Decoder()

    def __reduce__(self) -> tuple[Any, ...]:
        return Decoder, ()

    def step(
        self, model: nn.Module, advance: Advance, x: Tensor, state: ModelState, state_indices: Tensor | None
    ) -> Tensor:
        """As advance(x, state.layers, state_indices), which depends on `model` and on nothing else."""
        if not _may_be_recorded(x):
            return advance(x, state.layers, state_indices)
        steps = self._steps.setdefault(state, {})
        kind = (x.shape, x.dtype, state_indices is None, torch.is_inference_mode_enabled())
        if kind not in steps:
            steps[kind] = None
            return advance(x, state.layers, state_indices)
        known = steps[kind]
        if known is None or not known.is_current():
            known = steps[kind] = _Step(x, state_indices)
            return known.make(model, advance, x, state, state_indices)
        return known.run(advance, x, state, state_indices)


class _Step:
    """A recorded step, or the knowledge that it cannot be recorded, and what the recording was made from."""

    def __init__(self, x: Tensor, state_indices: Tensor | None) -> None:
        self._x = torch.empty_like(x)
        self._indices = None if state_indices is None else torch.empty_like(state_indices, dtype=torch.int64)
        self._recording: Recording | None = None
        self._sources = _Sources((), ())
        self._settings: Any = None

    def make(
        self, model: nn.Module, advance: Advance, x: Tensor, state: ModelState, state_indices: Tensor | None
    ) -> Tensor:
        """Runs the step, and records it."""
        self._take(x, state_indices)
        varying = [self._x, *(one for layer in state.layers for one in layer)]
        varying += [] if self._indices is None else [self._indices]
        result, recording = record(lambda: advance(self._x, state.layers, self._indices), varying)
        self._settings = _settings()
        if recording is not None:
            self._sources = _Sources(model.modules(), recording.sources)
            self._recording = recording if self._sources.can_be_watched() else None
        return result.clone()

    def run(self, advance: Advance, x: Tensor, state: ModelState, state_indices: Tensor | None) -> Tensor:
        """Runs the step from its recording where there is one."""
        if self._recording is None:
            return advance(x, state.layers, state_indices)
        self._take(x, state_indices)
        if not x.is_inference():
            torch.autograd.graph.increment_version(list(state.tensors().values()))
        return self._recording.run().clone()

    def is_current(self) -> bool:
        """Whether a recording would still do what the step does."""
        return self._recording is None or (self._settings == _settings() and self._sources.are_unchanged())

    def _take(self, x: Tensor, state_indices: Tensor | None) -> None:
        self._x.copy_(x)
        if self._indices is not None and state_indices is not None:
            self._indices.copy_(state_indices)


class _Sources:
    """Modules, and their parameters, buffers and hooks as they were.

    To look through them takes 50 µs, and several times that when the weights have driven all else out of the caches. So
    writes are looked for only where something was computed from what is written to; kernels read the rest where it is.
    What modules of others do, such as adapters, may depend on settings of their own: there is nothing to look at.
    """

    def __init__(self, modules: Iterable[nn.Module], computed_from: Iterable[Tensor]) -> None:
        modules = list(modules)
        self._dicts: list[dict[str, Any]] = []
        self._names: list[str] = []
        for module in modules:
            for named in (module._modules, module._parameters, module._buffers):
                self._dicts += [named] * len(named)
                self._names += named
        self._values = self._now()
        self._tensors = [one for one in self._values if isinstance(one, Tensor)]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)] + [
            global_hooks._global_forward_hooks,
            global_hooks._global_forward_pre_hooks,
        ]
        self._computed_from = list(computed_from)
        of_inference = any(one.is_inference() for one in self._computed_from)
        self._is_watchable = not (any(self._hooks) or of_inference or of_others(modules))
        self._contents = self._versions() if self._is_watchable else []

    def can_be_watched(self) -> bool:
        """Whether a change to them would be seen, and none of them does what a recording would leave out."""
        return self._is_watchable

    def are_unchanged(self) -> bool:
        """Whether all modules are there with the same tensors, which are where they were, and no hooks."""
        try:
            now = self._now()
        except KeyError:
            return False
        return all(map(operator.is_, now, self._values)) and self._versions() == self._contents and not any(self._hooks)

    def _now(self) -> list[Any]:
        return list(map(operator.getitem, self._dicts, self._names))

    def _versions(self) -> list[Any]:
        return [one._version for one in self._computed_from] + [one.data_ptr() for one in self._tensors]


def _settings() -> Any:
    """What else a step depends on: how its work is dealt out."""
    return torch.get_num_threads(), os.environ.get("SELECTIVE_SSM_BACKEND")


def _may_be_recorded(x: Tensor) -> bool:
    return x.is_cpu and type(x) is Tensor and x.numel() > 0 and not torch.is_autocast_enabled("cpu")
