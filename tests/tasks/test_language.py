"""The loss of the next token, and bits per byte."""

from __future__ import annotations

import math

import pytest
import torch

from selective_ssm.errors import UserError
from selective_ssm.tasks import bits_per_byte, next_token_loss


def test_loss_is_the_mean_of_minus_log_probability() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = -probabilities.gather(-1, targets[..., None]).log().mean()
    torch.testing.assert_close(next_token_loss(logits, targets), expected)


def test_ignored_targets_count_for_nothing() -> None:
    logits = torch.randn(1, 4, 5, requires_grad=True)
    targets = torch.tensor([[1, -100, 2, -100]])
    loss = next_token_loss(logits, targets)
    torch.testing.assert_close(loss, next_token_loss(logits[:, ::2], targets[:, ::2]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[:, 1::2].count_nonzero() == 0
    assert next_token_loss(logits, targets, reduction="sum").item() == pytest.approx(2 * loss.item())
    assert next_token_loss(logits, torch.full((1, 4), 7), ignore_index=7) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_fp32(dtype: torch.dtype) -> None:
    logits, targets = torch.randn(4, 1000, dtype=dtype), torch.arange(4)
    loss = next_token_loss(logits, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, next_token_loss(logits.float(), targets))


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(UserError, match=r"\(2, 3, 5\) and \(2, 4\)"):
        next_token_loss(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight() -> None:
    nats = next_token_loss(torch.zeros(20, 256), torch.arange(20), reduction="sum")
    assert bits_per_byte(float(nats), 20) == pytest.approx(8.0)
    assert bits_per_byte(10 * math.log(2), 5) == pytest.approx(2.0)
