"""RWKV's average over the past, as one operator: the maths, and the function people call.

With w the fade and u the bonus of a channel, and from the state a_0 and b_0,

    a_t = e^-w a_{t-1} + e^{k_t} v_t,   b_t = e^-w b_{t-1} + e^{k_t},
    y_t = (a_{t-1} + e^{k_t + u} v_t) / z_t,   z_t = b_{t-1} + e^{k_t + u}.

Backward, with α_t and β_t the gradients of a_t and b_t, and those of the end state from the caller,

    α_{t-1} = e^-w α_t + dy_t / z_t,   β_{t-1} = e^-w β_t − y_t dy_t / z_t,
    dk_t = e^{k_t} (α_t v_t + β_t) + s_t,   dv_t = e^{k_t} α_t + e^{k_t + u} dy_t / z_t,
    du = Σ s_t,   dw = −Σ e^-w (α_t a_{t-1} + β_t b_{t-1}),   s_t = e^{k_t + u} (v_t − y_t) dy_t / z_t.

No format holds e^{k_t}: a and b are kept as `Sums`, in units of the largest weight in them, and α and β likewise, since
their recurrence is the same one from the other end. Whatever is added to α has at most the unit 1 / z_t, and z_t is at
least each weight in it; so where a product of the two kinds is taken, the logarithms of its units add up to 0 or less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from selective_ssm.ops import checks
from selective_ssm.ops.dispatch import Case, choose
from selective_ssm.ops.registration import call, define, differentiate
from selective_ssm.ops.wkv import cuda, reference
from selective_ssm.ops.wkv.inputs import Gradients, Inputs


class Backend(Protocol):
    """What a module must offer to run the operator; it is handed checked inputs, contiguous and with elements."""

    def forward(self, inputs: Inputs, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns y, the end state, and, to `save`, what `backward` will need."""
        ...

    def backward(self, d_y: Tensor, d_end: Tensor | None, saved: Tensor, inputs: Inputs) -> Gradients:
        """The gradients of all inputs but cu_seqlens."""
        ...

    def saved_shape(self, inputs: Inputs) -> tuple[int, ...]:
        """The shape of what `forward` keeps, from sizes alone; (0,) for nothing."""
        ...


_BACKENDS: Mapping[str, Backend] = {"cuda": cuda, "reference": reference}


def wkv(
    k: Tensor,
    v: Tensor,
    fade: Tensor,
    bonus: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Averages v over each token's past, and the token itself: a softmax whose logits fall with age.

        y_t = (Σ_{i<t} e^{k_i - (t-1-i) fade} v_i + e^{k_t + bonus} v_t) / (the same with 1 for v)

    Computed in fp32 (float64 for float64). Differentiable once in all but cu_seqlens; the gradients are the same bits
    each time.

    Args:
        k: (B, L, D), logarithms of weights: fp32, bf16, fp16 or float64.
        v: (B, L, D), in k's dtype.
        fade: (D,) fp32, by how much logarithms of weights fall a token; 0 or more.
        bonus: (D,) fp32, by how much a token's own is above what it will be.
        state: (B, 3, D) fp32, or (S, 3, D) where sequences are packed: what came before, as `no_average` makes it.
        cu_seqlens: (S + 1,) boundaries of packed sequences, int32 or int64; B is 1 then.
        backend: which implementation runs it; None for the fastest that can (see `ops.dispatch`).

    Returns:
        y (B, L, D) in k's dtype; the state after the last token of each sequence, whose unit counts as a constant.

    Raises:
        ValueError: a shape or device does not fit, or the backend asked for cannot run here.
        TypeError: a dtype does not fit.

    Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048), section 3.1.2, and the
        recurrence in appendix D.

    Example:
        >>> from selective_ssm.ops.wkv import no_average
        >>> k, v = torch.zeros(1, 3, 1), torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> nothing = no_average(1, 1, k.device, k.dtype)
        >>> wkv(k, v, torch.zeros(1), torch.zeros(1), nothing)[0].flatten().tolist()
        [1.0, 1.5, 2.0]
    """
    inputs = Inputs(k, v, fade, bonus, state, cu_seqlens)
    _check(inputs)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, end, _ = call(_FORWARD, save, *inputs, save, backend)
    return y, end


def _check(inputs: Inputs) -> None:
    k, v, fade, bonus, state, cu_seqlens = inputs
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    sizes = checks.sizes_of(k, 3)
    checks.tensor("k", k, "BLD", sizes, (torch.float64, *checks.LOW_AND_SINGLE), k.device)
    checks.tensor("v", v, "BLD", sizes, (k.dtype,), k.device)
    batch, length, channels = k.shape
    for name, x in (("fade", fade), ("bonus", bonus)):
        checks.tensor(name, x, "D", (channels,), (wide,), k.device)
    if cu_seqlens is not None:
        checks.device("cu_seqlens", cu_seqlens, k.device)
        checks.cu_seqlens(cu_seqlens, batch, length)
    first, rows = ("B", batch) if cu_seqlens is None else ("S", cu_seqlens.shape[0] - 1)
    checks.tensor("state", state, (first, "3", "D"), (rows, 3, channels), (wide,), k.device)


def _choose(k: Tensor, backend: str | None) -> Backend:
    return _BACKENDS[choose(Case("wkv", checks.device_type(k), k.dtype, complex_state=False), backend)]


def _contiguous(inputs: Inputs) -> Inputs:
    return Inputs(*[None if x is None else x.contiguous() for x in inputs])  # pyright: ignore[reportArgumentType]


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, save, backend = arguments
    inputs = _contiguous(Inputs(*tensors))
    chosen = _choose(inputs.k, backend)
    if inputs.k.numel() == 0:
        return torch.empty_like(inputs.k), inputs.state.clone(), _unsaved(inputs, save, chosen)
    y, end, saved = chosen.forward(inputs, save)
    return y, end, end.new_empty(0) if saved is None else saved


def _unsaved(inputs: Inputs, save: bool, chosen: Backend) -> Tensor:
    """What a forward pass will keep."""
    return inputs.state.new_empty(chosen.saved_shape(inputs) if save else (0,))


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, save, backend = arguments
    inputs = Inputs(*tensors)
    y, end = (x.new_empty(x.shape) for x in (inputs.k, inputs.state))
    return y, end, _unsaved(inputs, save, _choose(inputs.k, backend))


def _backward(d_y: Tensor, d_end: Tensor | None, saved: Tensor, *arguments: Any) -> Gradients:
    *tensors, backend = arguments
    inputs = _contiguous(Inputs(*tensors))
    d_end = None if d_end is None else d_end.contiguous()
    if inputs.k.numel() > 0:
        return _choose(inputs.k, backend).backward(d_y.contiguous(), d_end, saved, inputs)
    d_k, d_v, d_fade, d_bonus, d_state = (x.new_zeros(x.shape) for x in inputs[:-1])
    return d_k, d_v, d_fade, d_bonus, d_state if d_end is None else d_state.copy_(d_end)


def _fake_backward(d_y: Tensor, d_end: Tensor | None, saved: Tensor, *arguments: Any) -> Gradients:
    k, v, fade, bonus, state = (x.new_empty(x.shape) for x in arguments[:5])
    return k, v, fade, bonus, state


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], *tensors)
    ctx.backend = backend


def _differentiate(ctx: Any, d_y: Tensor | None, d_end: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, *tensors = ctx.saved_tensors
    d_y = torch.zeros_like(tensors[0]) if d_y is None else d_y
    gradients = call(_BACKWARD, torch.is_grad_enabled(), d_y, d_end, saved, *tensors, ctx.backend)
    return (*gradients, None, None, None)


_INPUTS = "Tensor k, Tensor v, Tensor fade, Tensor bonus, Tensor state, Tensor? cu_seqlens"
_FORWARD = define(
    f"wkv({_INPUTS}, bool save, str? backend) -> (Tensor y, Tensor end, Tensor saved)", _forward, _fake_forward
)
_BACKWARD = define(
    f"wkv_backward(Tensor d_y, Tensor? d_end, Tensor saved, {_INPUTS}, str? backend)"
    " -> (Tensor d_k, Tensor d_v, Tensor d_fade, Tensor d_bonus, Tensor d_state)",
    _backward,
    _fake_backward,
)
differentiate(_FORWARD, _differentiate, _remember)
differentiate(_BACKWARD, lambda ctx, *_: checks.refuse_twice("wkv"))
