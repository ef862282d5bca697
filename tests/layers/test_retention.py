"""Retention: parallel, recurrent and in chunks it is one map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selective_ssm.layers.retention import powers, retain, retain_step

B, L, H, P, E = 2, 24, 3, 4, 5


def some(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def parallel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(Q Kᵀ ⊙ D) V / √P, head by head."""
    heads: list[Tensor] = []
    for head in range(q.shape[2]):
        gamma = 1 - 2.0 ** (-5 - head)
        n = torch.arange(q.shape[1], dtype=torch.float64)
        D = (gamma ** (n[:, None] - n)).tril()
        heads.append((q[:, :, head] @ k[:, :, head].mT * D) @ v[:, :, head] / q.shape[-1] ** 0.5)
    return torch.stack(heads, 2)


def recurrent(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    state = state.clone()
    return torch.stack([retain_step(q[:, t], k[:, t], v[:, t], state) for t in range(q.shape[1])], 1), state


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 24, 100])
def test_three_forms_are_one(chunk: int) -> None:
    q, k, v, zeros = some(B, L, H, P), some(B, L, H, P), some(B, L, H, E), torch.zeros(B, H, P, E).double()
    y, state = retain(q, k, v, zeros, None, chunk)
    assert_same(y, parallel(q, k, v))
    stepped, last = recurrent(q, k, v, zeros)
    assert_same(stepped, y)
    assert_same(state, last)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_each_sequence_of_a_pack_goes_on_from_its_own_state(chunk: int) -> None:
    lengths = [0, 6, 1, 0, 0, 17, 0]
    q, k, v, before = some(1, L, H, P), some(1, L, H, P), some(1, L, H, E), some(len(lengths), H, P, E)
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    y, state = retain(q, k, v, before, cuts, chunk)
    for index, pieces in enumerate(zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)):
        expected = (
            recurrent(*pieces, before[index : index + 1]) if lengths[index] else (None, before[index : index + 1])
        )
        assert_same(state[index : index + 1], expected[1])
        if expected[0] is not None:
            assert_same(y[:, cuts[index] : cuts[index + 1]], expected[0])


def test_decay_is_applied_once_a_token() -> None:
    """What one token left is there by γ^n after n more that add nothing."""
    k, v, nothing = some(1, 1, H, P), some(1, 1, H, E), torch.zeros(1, 9, H, 1).double()
    k, v = (torch.cat([x, nothing.expand(-1, -1, -1, x.shape[-1])], 1) for x in (k, v))
    _, state = retain(k, k, v, torch.zeros(1, H, P, E).double(), None, 4)
    gamma = torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128], dtype=torch.float64)
    assert_same(state[0], (gamma**9)[:, None, None] * (k[0, 0, :, :, None] * v[0, 0, :, None]))
    assert_same(powers(torch.tensor([9]), H)[:, 0], gamma**9)


def test_what_is_not_a_number_stays_in_its_sequence() -> None:
    q, k, v = some(1, L, H, P), some(1, L, H, P), some(1, L, H, E)
    k[0, 3] = torch.nan
    y, state = retain(q, k, v, torch.zeros(2, H, P, E).double(), torch.tensor([0, 7, L]), 4)
    assert y[0, 6].isnan().all()
    assert y[0, 7:].isfinite().all()
    assert state[1].isfinite().all()


class _Reads(TorchDispatchMode):
    """How often a tensor's value is asked for on the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_pack_is_read_without_a_look_at_its_boundaries() -> None:
    q, k, v, before = some(1, L, H, P), some(1, L, H, P), some(1, L, H, E), some(3, H, P, E)
    with _Reads() as reads:
        retain(q, k, v, before, torch.tensor([0, 7, 7, L]), 4)
    assert reads.count == 0


def test_scores_of_half_precision_are_as_large_as_those_that_are_scaled() -> None:
    q = torch.full((1, 3, 1, 256), 17.0, dtype=torch.float16)  # q·q is 73,984, beyond what fp16 holds
    y, _ = retain(q, q, torch.ones_like(q), torch.zeros(1, 1, 256, 256), None, 8)
    assert y.isfinite().all()


def test_states_are_kept_in_single_precision() -> None:
    q, k, v = (x.bfloat16() for x in (some(B, L, H, P), some(B, L, H, P), some(B, L, H, E)))
    y, state = retain(q, k, v, torch.zeros(B, H, P, E), None, 8)
    exact, last = recurrent(q, k, v, torch.zeros(B, H, P, E).double())
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (y - exact).abs().max() <= 2**-7 * exact.abs().max()
    assert (state - last).abs().max() <= 2**-7 * last.abs().max()
