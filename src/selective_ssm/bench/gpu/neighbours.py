"""Every mixer as it trains on a GPU, beside its matrix products alone and beside public forms of it.

Legend: B batch, L length, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selective_ssm.bench.cases import Setup
from selective_ssm.bench.contenders import Contender, absent, passes
from selective_ssm.bench.gpu.attention import fastest, limited
from selective_ssm.bench.gpu.cases import NeighbourCase
from selective_ssm.bench.gpu.neighbour_peers import Form, public_forms
from selective_ssm.bench.gpu.operators import timed
from selective_ssm.bench.memory import forget_peak, peak
from selective_ssm.bench.run import Row
from selective_ssm.layers import Mixer, build_mixer

_DTYPE = torch.bfloat16  # of activations; weights and their gradients are fp32, as in training


def neighbours(case: NeighbourCase, setup: Setup) -> Iterator[Row]:
    """Forward and backward of a mixer, to its input and every parameter, with the most memory in use.

    The floor is its matrix products alone: what is beyond them, its sequence part costs. A peer is the same mixer,
    parameters included, with a sequence part by others; "ours times as fast" is its time by ours.
    """
    random = torch.Generator(setup.device).manual_seed(0)
    shape = (case.batch, case.length, case.d_model)
    x = torch.randn(shape, generator=random, device=setup.device).to(_DTYPE).requires_grad_()
    mixer = build_mixer(case.config, case.d_model).to(setup.device)
    row: Row = {"case": case.name}
    floor = _measured(products(mixer, x), setup)
    yield row | floor
    ours = _measured(_trained("ours", lambda x: mixer(x)[0], mixer, x), setup)
    yield row | ours | {"of its products": ours["gpu µs"] / floor["gpu µs"]}
    for who, form in public_forms(mixer, x).items():
        if who not in setup.peers:
            continue
        if form is None:
            yield row | _measured(absent(who), setup)
            continue
        theirs = _measured(_trained(who, form, mixer, x), setup)
        theirs["of its products"] = theirs["gpu µs"] / floor["gpu µs"]
        yield row | theirs | {"ours times as fast": theirs["gpu µs"] / ours["gpu µs"]}


def products(mixer: Mixer, x: Tensor) -> Contender:
    """What a mixer's linear layers compute when it is given x, by layers of these sizes, each with an input of its own.

    Weights are in the dtype of the product from the start.
    """
    layers: list[nn.Linear] = []
    inputs: list[Tensor] = []

    def look(linear: nn.Linear, given: tuple[Tensor], out: Tensor) -> None:
        has_bias = linear.bias is not None  # pyright: ignore[reportUnnecessaryComparison]
        sizes = (linear.in_features, linear.out_features)
        layers.append(nn.Linear(*sizes, bias=has_bias, device=out.device, dtype=out.dtype))
        inputs.append(torch.randn_like(given[0], dtype=out.dtype).requires_grad_())

    hooks = [one.register_forward_hook(look) for one in mixer.modules() if isinstance(one, nn.Linear)]
    with torch.no_grad():
        _in_mixed_precision(mixer, x)
    for hook in hooks:
        hook.remove()
    parameters = [parameter for layer in layers for parameter in layer.parameters()]

    def call() -> tuple[Tensor, ...]:
        return tuple(layer(given) for layer, given in zip(layers, inputs, strict=True))

    return Contender("its products", call, [*inputs, *parameters])


def _trained(who: str, form: Form, mixer: Mixer, x: Tensor) -> Contender:
    return Contender(who, partial(_in_mixed_precision, form, x), [x, *mixer.parameters()])


def _in_mixed_precision(form: Callable[[Tensor], Any], x: Tensor) -> Any:
    with torch.autocast(x.device.type, dtype=_DTYPE):
        return form(x)


def _measured(one: Contender, setup: Setup) -> Row:
    """The columns of a contender: its time; the most memory, of a call that compiles and tunes nothing any more."""
    ((_, call),) = passes(one, "forward+backward")
    row: Row = {"who": one.who}
    if call is None:
        return row | timed(None, setup, one.note)
    if one.who == "sdpa" and (best := fastest(call, setup)):
        call, row["by"] = limited(call, best), best
    call()
    forget_peak(setup.device)
    call()
    memory = peak(setup.device)
    return row | timed(call, setup) | memory
