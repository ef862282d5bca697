"""Those that are timed: ours and others, and what of them is timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Call = Callable[[], object]


class Contender(NamedTuple):
    """One of those that are timed."""

    who: str
    call: Callable[[], Any] | None
    """None where it cannot take part, for the reason in `note`."""
    leaves: list[Tensor]
    note: str = ""


def absent(who: str, note: str = "not installed") -> Contender:
    """One that cannot take part."""
    return Contender(who, None, [], note)


def imported(module: str) -> Any:
    """A module of a peer; None where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def passes(one: Contender, *names: str) -> Iterator[tuple[str, Call | None]]:
    """The passes of those names ("forward", "backward", "forward+backward"); nameless for what cannot be called."""
    if one.call is None:
        yield "", None
        return
    for name in names:
        if name == "forward":
            yield name, torch.no_grad()(one.call)
        else:
            with torch.set_grad_enabled(name == "backward"):
                results = _as_tuple(one.call())
            slopes = tuple(torch.ones_like(result) for result in results)
            if name == "backward":
                yield name, partial(torch.autograd.grad, results, one.leaves, slopes, retain_graph=True)
            else:
                yield name, partial(_both, one, slopes)


def kept_bytes(one: Contender) -> int:
    """Bytes kept from the forward pass for the backward one, the arguments and the output left out."""
    assert one.call is not None
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        out = one.call()
    for own in (*one.leaves, out):
        kept.pop(own.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def _both(one: Contender, slopes: tuple[Tensor, ...]) -> Any:
    assert one.call is not None
    return torch.autograd.grad(_as_tuple(one.call()), one.leaves, slopes)


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
