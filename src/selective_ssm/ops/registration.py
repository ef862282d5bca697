"""How an operator becomes one of torch's, at as little time a call as Python allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("selective_ssm", "DEF")
_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator for every device, with a fake that gives the shapes of its results; returns it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"selective_ssm::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.selective_ssm, name).default
    _IMPLEMENTATIONS[operator] = implementation
    return operator


def implementation_of(operator: Any) -> Callable[..., Any] | None:
    """What runs where an operator of ours is called, with nothing of torch in between; None for others' operators."""
    return _IMPLEMENTATIONS.get(operator)


def differentiate(
    operator: Any,
    backward: Callable[..., tuple[Tensor | None, ...]],
    remember: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
) -> None:
    """Give an operator a derivative, as `torch.library.register_autograd` does, at 50 µs less a call.

    That one reads the schema anew each time, for default values and keyword arguments, of which ours have none.

    Args:
        operator: what `define` returned.
        backward: (ctx, *gradients of the results) -> those of the arguments.
        remember: (ctx, arguments, results), called after the operator has run.
    """

    def differentiable(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return _Differentiable.apply(operator, backward, remember, *arguments)
        return _below_autograd(operator, *arguments)

    _LIBRARY.impl(operator.__name__.partition(".")[0], differentiable, "Autograd")


def call(operator: Any, is_differentiated: bool, *arguments: Any) -> Any:
    """Call an operator; where nothing is differentiated, past the kernel that would look for it."""
    if is_differentiated or torch.compiler.is_compiling():
        return operator(*arguments)
    return _below_autograd(operator, *arguments)


def _below_autograd(operator: Any, *arguments: Any) -> Any:
    if forward_ad._current_level >= 0:  # pyright: ignore[reportPrivateUsage]
        _refuse_tangents(operator, arguments)
    with torch._C._AutoDispatchBelowAutograd():  # pyright: ignore[reportPrivateUsage]
        return operator(*arguments)


def _refuse_tangents(operator: Any, arguments: tuple[Any, ...]) -> None:
    """What an operator makes of them would have none: a derivative of zero, without a word."""
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in arguments):
        raise RuntimeError(f"{operator} has no derivative in forward mode: take it backward (torch.autograd.grad)")


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Any, backward: Any, remember: Any, *arguments: Any) -> Any:
        results = _below_autograd(operator, *arguments)
        ctx.differentiate = backward
        if remember is not None:
            remember(ctx, arguments, results)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.differentiate(ctx, *gradients)
