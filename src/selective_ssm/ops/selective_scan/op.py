"""The selective scan: the maths, and the functions that people call.

Per channel d and state n, with A (D, N), and B_t, C_t of the channel's group:

    dt_t = softplus(delta_t + delta_bias)                        (softplus only where asked)
    h_t  = exp(dt_t A) h_{t-1} + b_t
    b_t  = dt_t B_t u_t                                          (euler)
    b_t  = (exp(dt_t A) - 1) / A  B_t u_t                        (zoh)
    y_t  = sum_n C_t h_t  +  D u_t                               (2 Re(sum_n C_t h_t) where A is complex)
    out_t = y_t SiLU(z_t)

Source: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", equations 2 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selective_ssm.ops import checks
from selective_ssm.ops.operator import Operator
from selective_ssm.ops.selective_scan import cpu, cuda, reference
from selective_ssm.ops.selective_scan.arguments import check_scan, check_step
from selective_ssm.ops.selective_scan.inputs import Inputs, Options, StepInputs

_CAST = ("u", "delta", "B", "C", "z")
"""What autocast makes low; the other parameters stay as they are."""


def _zero_state(inputs: Inputs, rows: int) -> Tensor:
    return inputs.A.new_zeros(rows, *inputs.A.shape)


def _is_complex(inputs: Inputs | StepInputs) -> bool:
    return inputs.A.is_complex()


_SCAN = Operator(
    "selective_scan",
    Inputs,
    StepInputs,
    Options,
    _zero_state,
    _is_complex,
    check_step,
    {"cuda": cuda, "cpu": cpu, "reference": reference},
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    discretization: str = "euler",
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs a state space whose step, input and output maps change with time along a sequence.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = C_t h_t + D u_t;  out_t = y_t SiLU(z_t); see the module for every
    variant. Differentiable once in every floating tensor, `initial_state` and the final state included; time and memory
    are linear in L, and nothing of shape (B, L, D, N) is stored.

    Args:
        u: (B, L, D) input, channels last. fp32, bf16, fp16, or float64 (then everything is float64). Any strides but
            a unit one in D; so for `delta` and `z`.
        delta: (B, L, D) step sizes, or what the softplus makes them of, in the unit of time in which A is a rate.
        A: (D, N) fp32 rates, negative; complex64 for a complex state that stands for conjugate pairs.
        B: (B, L, G, N) with channel d in group d // (D / G); (B, L, N) for one group; (D, N) if time-invariant.
        C: as B.
        D: (D,) fp32 skip, or None.
        z: (B, L, D) gate, or None.
        delta_bias: (D,) fp32, added to `delta`, or None.
        delta_softplus: whether dt = softplus(delta + delta_bias), linear above 20.
        initial_state: (B, D, N) in A's dtype, the state before the first token; (S, D, N) for packs. None is zero.
        cu_seqlens: (S + 1,) int32 or int64 offsets of S sequences packed into one row (B = 1), from 0 to L; each starts
            from its own state. An empty sequence hands its state through.
        reverse: runs each sequence from its last token to its first, as if it were flipped before and after.
        discretization: "euler" for dt B (the released checkpoints), "zoh" for the exact zero-order hold.
        return_final_state: whether the state after each sequence's last token is returned too.
        backend: which implementation runs it; None for the fastest that can (see `ops.dispatch`).

    Returns:
        out (B, L, D) in u's dtype; with `return_final_state` also the final state (B or S, D, N) in A's dtype.

    Raises:
        ValueError: a shape, stride, device or option does not fit, or the backend asked for cannot run here.
        TypeError: a dtype does not fit.

    Source: Gu & Dao 2023, section 3.2, algorithm 2; section 3.3 for the fused scan.

    Example:
        >>> import torch
        >>> u, delta = torch.ones(1, 3, 2), torch.ones(1, 3, 2)
        >>> A, B, C = -torch.ones(2, 1), torch.ones(1, 3, 1), torch.ones(1, 3, 1)
        >>> selective_scan(u, delta, A, B, C)[0, :, 0]
        tensor([1.0000, 1.3679, 1.5032])
    """
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    check_scan(inputs, discretization)
    inputs = checks.autocast(inputs, _CAST)
    return _SCAN(inputs, Options(delta_softplus, reverse, discretization), return_final_state, backend)


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    discretization: str = "euler",
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advances the selective scan by one token, in place and in constant memory; carries no gradient.

    Args:
        state: (slots, D, N) in A's dtype, updated in place.
        u: (B, D), as `delta` and `z`; dtypes as for `selective_scan`.
        delta: (B, D).
        A: (D, N).
        B: (B, G, N), (B, N) for one group, or (D, N) for a time-invariant map. Where B = D a matrix is read as (B, N):
            write a time-invariant map as its expansion to (B, D, N), one group a channel.
        C: as B.
        D: (D,) or None.
        z: (B, D) or None.
        delta_bias: (D,) or None.
        delta_softplus: as for `selective_scan`.
        discretization: as for `selective_scan`.
        state_indices: (B,) int32 or int64: the slot of each row, all different; a negative one marks padding, whose
            output is 0 and which touches no slot. None: row b is slot b.
        backend: as for `selective_scan`.

    Returns:
        out (B, D) in u's dtype.

    Raises:
        ValueError: a shape, stride, device, option or slot does not fit, or the backend asked for cannot run here.
        TypeError: a dtype does not fit.

    Source: Gu & Dao 2023, section 3.2, equation 2a.

    Example:
        >>> import torch
        >>> state, one = torch.zeros(1, 2, 1), torch.ones(1, 2)
        >>> for _ in range(3):
        ...     out = selective_scan_step(state, one, one, -torch.ones(2, 1), torch.ones(1, 1), torch.ones(1, 1))
        >>> out[0, 0]
        tensor(1.5032)
    """
    inputs = checks.autocast(StepInputs(u, delta, A, B, C, D, z, delta_bias), _CAST)
    return _SCAN.step(state, inputs, Options(delta_softplus, False, discretization), state_indices, backend)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` for tensors with the length last, argument for argument like `mamba_ssm.selective_scan_fn`.

    Args:
        u: (B, D, L), as `delta` and `z`.
        delta: (B, D, L).
        A: (D, N).
        B: (D, N), (B, N, L) or (B, G, N, L); for complex A one that varies may hold real and imaginary parts in turn
            along a last axis of 2 L.
        C: as B.
        D: (D,) or None.
        z: (B, D, L) or None.
        delta_bias: (D,) or None.
        delta_softplus: as for `selective_scan`.
        return_last_state: whether the state after the last token is returned too.

    Returns:
        out (B, D, L) in u's dtype; with `return_last_state` also the last state (B, D, N).

    Raises:
        ValueError, TypeError: as `selective_scan`.

    Example:
        >>> import torch
        >>> u, A, B = torch.ones(1, 2, 3), -torch.ones(2, 1), torch.ones(1, 1, 3)
        >>> selective_scan_fn(u, u, A, B, B)[0, 0]
        tensor([1.0000, 1.3679, 1.5032])
    """

    def length_second(x: Tensor) -> Tensor:
        return x.movedim(-1, 1).contiguous()

    def projection(x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x
        if A.is_complex() and not x.is_complex() and x.shape[-1] == 2 * u.shape[-1]:
            x = torch.view_as_complex(x.to(A.real.dtype).unflatten(-1, (-1, 2)).contiguous())
        return length_second(x)

    result = selective_scan(
        length_second(u), length_second(delta), A, projection(B), projection(C), D,
        None if z is None else length_second(z), delta_bias,
        delta_softplus=delta_softplus, return_final_state=return_last_state,
    )  # fmt: skip
    if isinstance(result, tuple):
        return result[0].transpose(1, 2), result[1]
    return result.transpose(1, 2)
