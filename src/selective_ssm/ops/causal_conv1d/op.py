"""The causal depthwise convolution: the maths, and the functions that people call.

    out_t = act(bias + sum_k weight_k x_{t - (K - 1) + k}),   k = 0 ... K - 1,

where inputs before the first token are the initial state's, or zero.
"""

from __future__ import annotations

from torch import Tensor

from selective_ssm.ops import checks
from selective_ssm.ops.causal_conv1d import cpu, cuda, reference
from selective_ssm.ops.causal_conv1d.arguments import check_conv, check_step
from selective_ssm.ops.causal_conv1d.inputs import Inputs, Options, StepInputs
from selective_ssm.ops.operator import Operator


def _zero_state(inputs: Inputs, rows: int) -> Tensor:
    channels, width = inputs.weight.shape
    return inputs.x.new_zeros(rows, channels, width - 1)


def _is_complex(inputs: Inputs | StepInputs) -> bool:
    return False


_CONV = Operator(
    "causal_conv1d",
    Inputs,
    StepInputs,
    Options,
    _zero_state,
    _is_complex,
    check_step,
    {"cuda": cuda, "cpu": cpu, "reference": reference},
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolves each channel with its own short filter, looking back only.

    out_t = act(bias + sum_k weight_k x_{t - (K - 1) + k}). Differentiable once in every floating tensor.

    Args:
        x: (B, L, D) input, channels last: fp32, bf16, fp16 or float64; any strides but a unit one in D.
        weight: (D, K); `weight[:, K - 1]` meets the present token.
        bias: (D,) or None.
        activation: "silu" or None.
        initial_state: (B, D, K - 1) the inputs before the first token, oldest first; (S, D, K - 1) for packs.
        cu_seqlens: (S + 1,) int32 or int64 offsets of S sequences packed into one row (B = 1), from 0 to L.
        reverse: runs each sequence from its last token to its first, as if it were flipped before and after; a state
            then holds the K - 1 inputs that follow.
        return_final_state: whether each sequence's last K - 1 inputs are returned too.
        backend: which implementation runs it; None for the fastest that can (see `ops.dispatch`).

    Returns:
        out (B, L, D) in x's dtype; with `return_final_state` also the final state (B or S, D, K - 1).

    Raises:
        ValueError: a shape, stride, device or option does not fit, or the backend asked for cannot run here.
        TypeError: a dtype does not fit.

    Source: Gu & Dao 2023, section 3.4, figure 3.

    Example:
        >>> import torch
        >>> causal_conv1d(torch.arange(1.0, 5.0).view(1, 4, 1), torch.tensor([[10.0, 1.0]]))[0, :, 0]
        tensor([ 1., 12., 23., 34.])
    """
    inputs = Inputs(x, weight, bias, initial_state, cu_seqlens)
    check_conv(inputs, activation)
    inputs = checks.autocast(inputs, ("x",))
    return _CONV(inputs, Options(activation, reverse), return_final_state, backend)


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advances the convolution by one token, in place and in constant memory; carries no gradient.

    Args:
        state: (slots, D, K - 1) the last inputs, oldest first, updated in place.
        x: (B, D).
        weight: (D, K).
        bias: (D,) or None.
        activation: "silu" or None.
        state_indices: (B,) int32 or int64: the slot of each row, all different; a negative one marks padding, whose
            output is 0 and which touches no slot. None: row b is slot b.
        backend: as for `causal_conv1d`.

    Returns:
        out (B, D) in x's dtype.

    Raises:
        ValueError: a shape, stride, device, option or slot does not fit, or the backend asked for cannot run here.
        TypeError: a dtype does not fit.

    Source: Gu & Dao 2023, section 3.4.

    Example:
        >>> import torch
        >>> state = torch.zeros(1, 1, 1)
        >>> [causal_conv1d_step(state, torch.tensor([[x]]), torch.tensor([[10.0, 1.0]])).item() for x in (1.0, 2.0)]
        [1.0, 12.0]
    """
    inputs = checks.autocast(StepInputs(x, weight, bias), ("x",))
    return _CONV.step(state, inputs, Options(activation, False), state_indices, backend)
