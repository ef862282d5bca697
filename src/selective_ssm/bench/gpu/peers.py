"""What ours is timed beside. Each peer is a package of others, imported where it is called and missed in one word.

Legend: B batch, L length, D channels, N state.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from selective_ssm.bench.cases import OpCase
from selective_ssm.bench.contenders import Contender, absent, imported
from selective_ssm.bench.run import leaves

PEERS = ("mamba_ssm", "sdpa", "transformers", "fla", "torch")


def mamba_scan(inputs: Mapping[str, Tensor], case: OpCase) -> Contender:
    """`selective_scan_fn`, on tensors laid out as it wants them: (B, D, L) and (B, N, L)."""
    if case.sequences or case.reverse or case.discretization != "euler":
        return absent("mamba_ssm", "has none")
    module = imported("mamba_ssm.ops.selective_scan_interface")
    if module is None:
        return absent("mamba_ssm")
    laid_out = leaves({name: _length_last(tensor) for name, tensor in inputs.items()})
    return Contender(
        "mamba_ssm", partial(module.selective_scan_fn, **laid_out, delta_softplus=True), list(laid_out.values())
    )


def mamba_conv(inputs: Mapping[str, Tensor]) -> Contender:
    """`causal_conv1d_fn`, on a channels-last (B, D, L)."""
    module = imported("causal_conv1d")
    if module is None:
        return absent("causal_conv1d")
    own = leaves({name: tensor.detach() for name, tensor in inputs.items()})

    def call() -> Tensor:
        return module.causal_conv1d_fn(own["x"].transpose(1, 2), own["weight"], own["bias"], activation="silu")

    return Contender("causal_conv1d", call, list(own.values()))


def mamba_step(state: Tensor, inputs: Mapping[str, Tensor]) -> Contender:
    """`selective_state_update`."""
    module = imported("mamba_ssm.ops.triton.selective_state_update")
    if module is None:
        return absent("mamba_ssm")
    names = {"u": "x", "delta": "dt", "delta_bias": "dt_bias"}
    renamed = {names.get(name, name): tensor for name, tensor in inputs.items()}
    return Contender("mamba_ssm", partial(module.selective_state_update, state, **renamed, dt_softplus=True), [])


def _length_last(x: Tensor) -> Tensor:
    """(B, L, …) as (B, …, L) in memory of its own; parameters as they are."""
    return x.detach().transpose(1, 2).contiguous() if x.dim() == 3 else x.detach().clone()
