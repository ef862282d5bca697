"""A padded batch and its pack are one another, and the mask's shape is checked."""

from __future__ import annotations

import pytest
import torch

from selective_ssm.errors import UserError
from selective_ssm.interop.transformers.padding import Padding


def test_rows_lie_end_to_end_and_come_back() -> None:
    for _ in range(20):
        batch, length = (int(n) for n in torch.randint(1, 6, (2,)))
        mask = torch.randint(2, (batch, length + 2))
        padding = Padding.of(mask, batch, length)
        counts = mask[:, -length:] == 1
        if padding is None:
            assert counts.all()
            continue
        x = torch.randn(batch, length, 3)
        packed = padding.pack(x)
        bounds = padding.cu_seqlens.tolist()
        assert bounds[-1] == x[..., 0].numel() > padding.tokens == counts.sum()
        for row in range(batch):
            assert torch.equal(packed[0, bounds[row] : bounds[row + 1]], x[row, counts[row]])
        assert torch.equal(padding.unpack(packed), x)
        assert torch.equal(padding.unpack(packed[:, : padding.tokens])[counts], x[counts])


def test_a_batch_of_padding_alone_has_its_shape() -> None:
    padding, x = Padding.of(torch.zeros(2, 3), 2, 3), torch.randn(2, 3, 4)
    assert padding is not None
    assert padding.unpack(padding.pack(x)[:, : padding.tokens]).shape == x.shape


def test_without_padding_there_is_none() -> None:
    assert Padding.of(None, 2, 3) is None
    assert Padding.of(torch.ones(2, 3), 2, 3) is None
    assert Padding.of(torch.tensor([[0, 1], [0, 1]]), 2, 1) is None


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (3,), (2, 1, 3, 3)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"attention_mask has the shape .*; expected \(2, 3\) or longer"):
        Padding.of(torch.ones(shape), 2, 3)
