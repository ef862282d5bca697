"""Packs: what is read together, or beside padding, is what is read alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selective_ssm.generation.packs import PADDED, Pack, Piece, Size, padded, read, size_of
from selective_ssm.generation.slots import Slots
from tests.generation.oracle import VOCABULARY, shared_model

PIECES: list[Piece] = [(2, [1, 2, 3]), (0, [4]), (1, [5, 6])]


def ends_of(pieces: list[Piece], *sizes: Size | None) -> list[dict[str, Tensor]]:
    """The states of three slots after a pack of pieces, once for each size of it, all in the same slots."""
    slots = Slots(shared_model(), 3, VOCABULARY)
    blank = slots.state.clone()
    packs = [Pack(size or size_of(pieces), slots) for size in sizes]
    ends: list[dict[str, Tensor]] = []
    for pack in packs:
        slots.state.put(range(4), blank)
        pack.fill(pieces)
        with torch.no_grad():
            read(shared_model(), slots, pack)
        ends.append({name: tensor[:3].clone() for name, tensor in slots.state.tensors().items()})
    return ends


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-9, atol=1e-9)


def test_what_is_read_in_one_pack_is_what_is_read_one_by_one() -> None:
    together = ends_of(PIECES, None)[0]
    assert together["position"].tolist() == [1, 2, 3]
    slots = Slots(shared_model(), 3, VOCABULARY)
    for slot, ids in PIECES:
        for token in ids:
            alone = Pack(Size(1, 1), slots)
            alone.fill([(slot, [token])])
            with torch.no_grad():
                read(shared_model(), slots, alone)
    assert_same(together, {name: tensor[:3] for name, tensor in slots.state.tensors().items()})


@pytest.mark.parametrize("size", [Size(16, 4), Size(16, 8), Size(6, 5)])
def test_padding_changes_nothing(size: Size) -> None:
    exact, beside_padding, again = ends_of(PIECES, None, size, size)
    assert_same(beside_padding, exact)
    assert all(torch.equal(tensor, beside_padding[name]) for name, tensor in again.items())


def test_a_pack_of_padding_reads_nothing() -> None:
    (end,) = ends_of([], Size(8, 4))
    assert not any(tensor.any() for tensor in end.values())


@pytest.mark.parametrize("tokens", [1, 256, 257, 8192])
@pytest.mark.parametrize("pieces", [1, 7, 8, 31])
def test_there_is_room_for_all_and_a_piece_of_padding(tokens: int, pieces: int) -> None:
    size = padded(Size(tokens, pieces))
    assert size is not None
    assert size.tokens >= tokens
    assert size.pieces > pieces
    assert size.tokens < 2 * max(tokens, 129)


@pytest.mark.parametrize("size", [Size(8193, 1), Size(100, 32)])
def test_what_is_larger_is_not_padded(size: Size) -> None:
    assert padded(size) is None
    assert padded(PADDED[-1]) is None
