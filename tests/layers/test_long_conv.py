"""Long convolutions are the sums that they stand for, and rows of packs see nothing but their own sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selective_ssm.layers import State, long_conv
from selective_ssm.layers.long_conv import (
    _fast_size,
    causal_convolution,
    latest_first,
    run_packed,
    two_sided_convolution,
)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 30, 65])
def test_convolution_is_its_sum(length: int) -> None:
    x, kernel = torch.randn(2, length, 3).double(), torch.randn(3, length).double()
    expected = torch.zeros_like(x)
    for t in range(length):
        for lag in range(t + 1):
            expected[:, t] += kernel[:, lag] * x[:, t - lag]
    torch.testing.assert_close(causal_convolution(x, kernel), expected, rtol=1e-10, atol=1e-10)


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def test_skip_and_offset_are_added() -> None:
    x, kernel, skip, offset = drawn(2, 7, 3), drawn(3, 7), drawn(3), drawn(2, 3, 7)
    plain = causal_convolution(x, kernel)
    assert_close = torch.testing.assert_close
    assert_close(causal_convolution(x, kernel, skip, offset), plain + skip * x + offset.mT)
    both = two_sided_convolution(x, kernel, kernel)
    assert_close(two_sided_convolution(x, kernel, kernel, skip), both + skip * x)
    ahead = causal_convolution(x.flip(1), kernel).flip(1)[:, 1:]
    assert_close(both[:, :-1], plain[:, :-1] + ahead)
    assert_close(both[:, -1], plain[:, -1])


@pytest.mark.parametrize("at_once", [1, 1 << 22])
@pytest.mark.parametrize("length", [1, 6])
def test_gradients_are_those_of_differences(length: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_conv, "_AT_ONCE", at_once)
    x, kernel, skip, offset = drawn(3, length, 2), drawn(2, length), drawn(2), drawn(3, 2, length)
    assert torch.autograd.gradcheck(causal_convolution, (x, kernel, skip, offset))
    assert torch.autograd.gradcheck(two_sided_convolution, (x, kernel, drawn(2, length), skip))
    assert torch.autograd.gradcheck(causal_convolution, (x, kernel.detach()))
    assert torch.autograd.gradcheck(causal_convolution, (x.detach(), kernel, None, offset.detach()))


def test_low_precision_is_rounded_once() -> None:
    x = drawn(2, 40, 3, dtype=torch.bfloat16)
    kernel, offset = drawn(3, 40, dtype=torch.float32), drawn(2, 3, 40, dtype=torch.float32)
    wide = x.detach().float().requires_grad_()
    y, expected = (causal_convolution(one, kernel, None, offset) for one in (x, wide))
    assert torch.equal(y, expected.bfloat16())
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, kernel, offset), dy)
    of_wide = torch.autograd.grad(expected, (wide, kernel, offset), dy.float())
    for one, other in zip(gradients, of_wide, strict=True):
        assert torch.equal(one, other.to(one.dtype))


def test_differentiating_twice_is_refused() -> None:
    x, kernel = drawn(1, 5, 2), drawn(2, 5)
    y = causal_convolution(x, kernel).square().sum()
    with pytest.raises(RuntimeError, match="a long convolution cannot be differentiated twice"):
        torch.autograd.grad(y, x, create_graph=True)


def test_sizes_of_transforms_have_small_factors_and_little_padding() -> None:
    for least in [*range(1, 300), 4097 * 2, 2**20 + 1]:
        size = _fast_size(least)
        assert least <= size <= 1.25 * least
        while size % 2 == 0:
            size //= 2
        assert size in (1, 3, 5, 7, 9, 15)


def test_rows_are_turned_within_their_length() -> None:
    x = torch.tensor([[1.0, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]])[..., None]
    turned = latest_first(x, torch.tensor([3, 1, 4]))[..., 0]
    assert turned.tolist() == [[3, 2, 1, 0], [4, 0, 0, 0], [8, 7, 6, 5]]


def running_sum(
    x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
) -> tuple[Tensor, State | None]:
    assert lengths is not None
    y = x.cumsum(1) + (0 if state is None else state[0][:, None])
    ends = latest_first(x, lengths).sum(1) + (0 if state is None else state[0])
    return y, (ends,) if return_state else None


@pytest.mark.parametrize("resumed", [False, True])
def test_packed_rows_come_back_in_their_places(resumed: bool) -> None:
    lengths = [3, 0, 17, 1, 4, 16, 0, 5]
    x = torch.randn(1, sum(lengths), 2).double()
    x[0, 3 + 7] = torch.nan  # stays within the third sequence
    before = torch.randn(len(lengths), 2).double() if resumed else torch.zeros(len(lengths), 2).double()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    y, ends = run_packed(running_sum, x, (before,) if resumed else None, cu_seqlens, True)
    assert ends is not None
    for row, piece in enumerate(x[0].split(lengths)):
        found = y[0, cu_seqlens[row] : cu_seqlens[row + 1]]
        torch.testing.assert_close(found, piece.cumsum(0) + before[row], equal_nan=True)
        torch.testing.assert_close(ends[0][row], piece.sum(0) + before[row], equal_nan=True)
    assert run_packed(running_sum, x, None, cu_seqlens, False)[1] is None
