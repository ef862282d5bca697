"""Slots: padding touches nothing, memory stays where it is, nothing of a former text is left."""

from __future__ import annotations

import torch
from torch import Tensor

from selective_ssm.generation.packs import Pack, Piece, Size, read, size_of
from selective_ssm.generation.sampling import Sampling
from selective_ssm.generation.slots import Beginning, Slots, advance
from tests.generation.oracle import VOCABULARY, shared_model, written_alone

PROMPT = [3, 1, 4, 1, 5]
GREEDY = Sampling(temperature=0)
PENALISED = Sampling(temperature=0, repetition_penalty=3.0)


def made(count: int) -> Slots:
    return Slots(shared_model(), count, VOCABULARY)


def memory(slots: Slots) -> dict[str, Tensor]:
    names = {"pending": slots.pending, "real": slots.settings.real, "whole": slots.settings.whole, "seen": slots.seen}
    return {**names, **slots.state.tensors()}


def read_pieces(slots: Slots, pieces: list[Piece], size: Size | None = None) -> None:
    pack = Pack(size or size_of(pieces), slots)
    pack.fill(pieces)
    read(shared_model(), slots, pack)


@torch.no_grad()
def written(slots: Slots, slot: int, sampling: Sampling, count: int) -> list[int]:
    slots.begin([Beginning(slot, None, PROMPT[-1], sampling, PROMPT)])
    read_pieces(slots, [(slot, PROMPT[:-1])])
    return [int(advance(shared_model(), slots, slots.rows([slot]), sampling.needs)[0][0]) for _ in range(count)]


def test_a_slot_writes_what_its_text_is_and_keeps_nothing_of_the_one_before() -> None:
    slots = made(2)
    for sampling in (PENALISED, GREEDY, PENALISED, Sampling(seed=4), PENALISED):
        assert written(slots, 1, sampling, 6) == written_alone(shared_model(), PROMPT, 6, sampling)


@torch.no_grad()
def test_padding_touches_no_slot() -> None:
    slots = made(4)
    slots.begin([Beginning(slot, None, slot, PENALISED, PROMPT) for slot in range(4)])
    before = {name: tensor.clone() for name, tensor in memory(slots).items()}
    rows = slots.rows([2, 0, 3])
    assert rows.tolist() == [2, 0, 3, -1]
    tokens, logprobs = advance(shared_model(), slots, rows, PENALISED.needs._replace(logprobs=True))
    assert tokens.shape == (4,)
    assert logprobs is not None
    for name, tensor in memory(slots).items():
        assert torch.equal(tensor[1], before[name][1]), name
    assert not torch.equal(slots.pending[:4], before["pending"][:4])
    assert slots.state.position[:4].tolist() == [1, 0, 1, 1]


@torch.no_grad()
def test_memory_stays_where_it_is() -> None:
    """So that a CUDA graph can be made of a step."""
    slots = made(3)
    places = {name: tensor.data_ptr() for name, tensor in memory(slots).items()}
    rows = {count: slots.rows([*range(count)]) for count in (1, 2, 3)}
    assert [one.tolist() for one in rows.values()] == [[0], [0, 1], [0, 1, 2]], "no more rows than slots"
    for _ in range(2):
        written(slots, 0, PENALISED, 2)
    read_pieces(slots, [(2, [1, 2]), (1, [3])])
    assert {name: tensor.data_ptr() for name, tensor in memory(slots).items()} == places
    assert slots.rows([2, 1]) is rows[2]
    assert rows[2].tolist() == [2, 1]


def test_a_text_leaves_the_state_that_it_goes_on_from_as_it_is() -> None:
    slots, given = made(1), shared_model().init_state(1)
    slots.begin([Beginning(0, given, 3, GREEDY, [3])])
    advance(shared_model(), slots, slots.rows([0]), GREEDY.needs)
    assert slots.state.position[:1].tolist() == [1]
    assert not any(tensor.any() for tensor in given.tensors().values())
