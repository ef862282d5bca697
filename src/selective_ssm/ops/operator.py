"""How a sequence operator of ours becomes one of torch's: registered once, for every backend it has.

An operator `name` gives rise to three in torch's library `selective_ssm`:

- `name`: (inputs, options) -> (out, final_state, saved), the last two of size zero where not asked for;
- `name_backward`: the gradients of the inputs, by an explicit formula, which itself has none;
- `name_step`: one token; changes its state in place and carries no gradient.

Each asks `dispatch.choose` when it runs, so that compiled programs choose as eager ones do.
"""

from __future__ import annotations

import functools
import os
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from selective_ssm.ops import checks, nvrtc
from selective_ssm.ops.dispatch import Case, choose
from selective_ssm.ops.layouts import Layouts, layouts_of
from selective_ssm.ops.registration import call, define, differentiate

_MOST_REMEMBERED = 1024
"""Different steps that need no second check."""
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    str: "str",
    str | None: "str?",
}


class Backend(Protocol):
    """What a module must offer to run an operator; it is handed checked, non-empty inputs."""

    def forward(self, inputs: Any, options: Any, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The output, the final state, and, to `save`, what `backward` will need."""
        ...

    def backward(
        self, d_out: Tensor, d_final: Tensor | None, saved: Tensor, inputs: Any, options: Any
    ) -> tuple[Tensor | None, ...]:
        """The gradient of each differentiable input, None where the input is None."""
        ...

    def saved_shape(self, inputs: Any) -> tuple[int, ...]:
        """The shape of what `forward` keeps, from sizes alone; (0,) for nothing."""
        ...

    def step(
        self, state: Tensor, inputs: Any, options: Any, state_indices: Tensor | None, layouts: Layouts | None = None
    ) -> Tensor:
        """One token. `layouts` are those of the state, the inputs and the indices, where they are known already."""
        ...


class Operator:
    """A sequence operator: its registration, and the calls that its public functions end in.

    Its arguments are three NamedTuples. `inputs` are the tensors: the sequence first, `initial_state` among them, and
    `cu_seqlens`, the one that is not differentiable, last; `step_inputs` those of a step; `options` the rest.
    `state_like` makes the zero state of so many rows; `is_complex` says whether a call's state is complex; `check_step`
    raises where the arguments of a step do not fit together.
    """

    def __init__(
        self,
        name: str,
        inputs: type[Any],
        step_inputs: type[Any],
        options: type[Any],
        state_like: Callable[[Any, int], Tensor],
        is_complex: Callable[[Any], bool],
        check_step: Callable[[Tensor, Any, Any, Tensor | None], None],
        backends: Mapping[str, Backend],
    ) -> None:
        self.name, self.backends = name, backends
        self._inputs, self._step_inputs, self._options = inputs, step_inputs, options
        self._counts = len(inputs._fields), len(step_inputs._fields), len(options._fields)
        self._state_like, self._is_complex, self._check_step = state_like, is_complex, check_step
        self._checked: set[tuple[Layouts, Any]] = set()
        self._register()

    def __call__(
        self, inputs: Any, options: Any, return_final_state: bool, backend: str | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The output, with the final state where it is asked for."""
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        out, final_state, _ = call(self._operator, save, *inputs, *options, return_final_state, save, backend)
        return (out, final_state) if return_final_state else out

    def step(
        self, state: Tensor, inputs: Any, options: Any, state_indices: Tensor | None, backend: str | None
    ) -> Tensor:
        """One token's output; `state` is updated in place."""
        if state_indices is not None:
            checks.slots(state_indices, state)
        if not torch.is_grad_enabled():
            return self._step_operator(state, *inputs, *options, state_indices, backend)
        with torch.no_grad():
            return self._step_operator(state, *inputs, *options, state_indices, backend)

    def _register(self) -> None:
        name, options = self.name, _schema(self._options)
        inputs, step_inputs = _schema(self._inputs), _schema(self._step_inputs)
        gradients = ", ".join(["Tensor"] * (len(self._inputs._fields) - 1))
        self._operator = define(
            f"{name}({inputs}, {options}, bool return_final_state, bool save, str? backend)"
            " -> (Tensor out, Tensor final_state, Tensor saved)",
            self._forward,
            self._fake_forward,
        )
        self._backward_operator = define(
            f"{name}_backward(Tensor d_out, Tensor? d_final, Tensor saved, {inputs}, {options}, str? backend)"
            f" -> ({gradients})",
            self._backward,
            self._fake_backward,
        )
        self._step_operator = define(
            f"{name}_step(Tensor(a!) state, {step_inputs}, {options}, Tensor? state_indices, str? backend) -> Tensor",
            self._step,
            self._fake_step,
        )
        differentiate(self._operator, self._differentiate, self._remember)
        differentiate(self._backward_operator, lambda ctx, *_: checks.refuse_twice(name))

    def _forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, options, (return_final_state, save, backend) = self._split(arguments)
        chosen = self._choose("", inputs, backend)
        if inputs[0].numel() == 0:
            out, final_state = self._hand_through(inputs)
            saved = final_state.new_zeros(chosen.saved_shape(inputs))
        else:
            out, final_state, saved = chosen.forward(inputs, options, save)
        return _or_empty((out, final_state if return_final_state else None, saved if save else None), inputs[0])

    def _fake_forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, _, (return_final_state, save, backend) = self._split(arguments)
        out, state = self._hand_through(inputs)
        saved = state.new_empty(self._choose("", inputs, backend).saved_shape(inputs)) if save else None
        return _or_empty((out, state if return_final_state else None, saved), inputs[0])

    def _backward(self, d_out: Tensor, d_final: Tensor | None, saved: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, options, (backend,) = self._split(arguments)
        chosen = self._choose("", inputs, backend)
        if inputs[0].numel() > 0:
            return _or_empty(chosen.backward(d_out, d_final, saved, inputs, options), inputs[0])
        zeros = {name: None if x is None else torch.zeros_like(x) for name, x in inputs._asdict().items()}
        if inputs.initial_state is not None and d_final is not None:
            zeros["initial_state"] = d_final.to(inputs.initial_state.dtype, copy=True)
        return _or_empty(list(zeros.values())[:-1], inputs[0])

    def _fake_backward(
        self, d_out: Tensor, d_final: Tensor | None, saved: Tensor, *arguments: Any
    ) -> tuple[Tensor, ...]:
        inputs, _, _ = self._split(arguments)
        return _or_empty([None if x is None else x.new_empty(x.shape) for x in inputs[:-1]], inputs[0])

    def _step(self, state: Tensor, *arguments: Any) -> Tensor:
        *rest, state_indices, backend = arguments
        _, n, _ = self._counts
        inputs, options = self._step_inputs(*rest[:n]), self._options(*rest[n:])
        layouts = layouts_of(state, *inputs, state_indices)
        if (layouts, options) not in self._checked:
            self._check_step(state, inputs, options, state_indices)
            if len(self._checked) == _MOST_REMEMBERED:
                self._checked.clear()
            self._checked.add((layouts, options))
        chosen = self._choose("_step", inputs, backend)
        if inputs[0].numel() == 0:
            return inputs[0].new_empty(*inputs[0].shape)
        return chosen.step(state, inputs, options, state_indices, layouts).contiguous()

    def _fake_step(self, state: Tensor, *arguments: Any) -> Tensor:
        *rest, state_indices, _ = arguments
        _, n, _ = self._counts
        inputs, options = self._step_inputs(*rest[:n]), self._options(*rest[n:])
        self._check_step(state, inputs, options, state_indices)
        return inputs[0].new_empty(inputs[0].shape)

    def _remember(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, options, (return_final_state, _, backend) = self._split(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[2], *tensors)
        ctx.options, ctx.backend, ctx.has_final_state = options, backend, return_final_state

    def _differentiate(self, ctx: Any, d_out: Tensor | None, d_final: Tensor | None, _: Tensor | None) -> Any:
        saved, *tensors = ctx.saved_tensors
        d_out = torch.zeros_like(tensors[0]) if d_out is None else d_out
        d_final = d_final if ctx.has_final_state else None
        arguments = (d_out, d_final, saved, *tensors, *ctx.options, ctx.backend)
        gradients = call(self._backward_operator, torch.is_grad_enabled(), *arguments)
        present = [None if x is None else gradient for x, gradient in zip(tensors[:-1], gradients, strict=True)]
        others = len(["cu_seqlens"]) + len(ctx.options) + len(["return_final_state", "save", "backend"])
        return (*present, *[None] * others)

    def _split(self, arguments: tuple[Any, ...]) -> tuple[Any, Any, tuple[Any, ...]]:
        """The flat arguments of a registered operator as (inputs, options, flags)."""
        n, _, m = self._counts
        return self._inputs(*arguments[:n]), self._options(*arguments[n : n + m]), arguments[n + m :]

    def _choose(self, suffix: str, inputs: Any, backend: str | None) -> Backend:
        sequence = inputs[0]
        case = Case(self.name + suffix, checks.device_type(sequence), sequence.dtype, self._is_complex(inputs))
        chosen = choose(case, backend)
        if (
            chosen == "reference"
            and case.device == "cuda"
            and backend is None
            and "SELECTIVE_SSM_BACKEND" not in os.environ
        ):
            _warn_of_slowness(nvrtc.explain())
        return self.backends[chosen]

    def _hand_through(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """The result without elements: states are handed through, as copies. Also the shape of every result."""
        rows = inputs[0].shape[0] if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
        state = self._state_like(inputs, rows)
        if inputs.initial_state is not None:
            state = inputs.initial_state.to(state.dtype, copy=True)
        return inputs[0].new_empty(inputs[0].shape), state


@functools.cache
def _warn_of_slowness(reason: str | None) -> None:
    """Once: a GPU that could run kernels of its own runs plain torch."""
    if reason is not None:
        warnings.warn(f"plain torch runs on the GPU, where kernels would be many times faster: {reason}", stacklevel=2)


def _schema(fields: type[Any]) -> str:
    """The arguments of a torch operator, from a NamedTuple's annotations."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in typing.get_type_hints(fields).items())


def _or_empty(tensors: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """What a registered operator returns: tensors always, of size zero for None, and laid out as its fake promises."""
    return tuple(like.new_empty(0) if x is None else x.contiguous() for x in tensors)
