"""The state of a model is one value: one buffer a dtype, indexed by slot."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from selective_ssm.errors import UserError
from selective_ssm.models import LanguageModel, ModelState, preset


def example() -> ModelState:
    """Two layers of different kinds with three slots, and one without memory."""
    layers = [
        (torch.randn(3, 4, 2), torch.randn(3, 4, 5, dtype=torch.float64)),
        (),
        (torch.randn(3, 6), torch.randn(3, 2, 2, dtype=torch.complex64), torch.empty(3, 4, 0), torch.arange(3)),
    ]
    return ModelState.from_layers(layers, torch.tensor([5, 6, 7]))


def assert_equal(one: ModelState, other: ModelState) -> None:
    assert torch.equal(one.position, other.position)
    for layer, expected in zip(one.layers, other.layers, strict=True):
        assert len(layer) == len(expected)
        assert all(torch.equal(part, wanted) for part, wanted in zip(layer, expected, strict=True))


def test_layers_are_views_of_one_buffer_a_dtype() -> None:
    state = example()
    tensors = state.tensors()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "position": (3,),
        "float32": (3, 4 * 2 + 6),
        "float64": (3, 4 * 5),
        "complex64": (3, 2 * 2),
        "int64": (3, 1),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    state.layers[0][0].fill_(1)
    state.layers[2][0].fill_(2)
    assert tensors["float32"].tolist() == [[1.0] * 8 + [2.0] * 6] * 3


def test_bytes_are_those_of_the_buffers() -> None:
    assert example().nbytes == 3 * (14 * 4 + 20 * 8 + 4 * 8 + 8 + 8)


def test_values_are_those_of_the_layers() -> None:
    torch.manual_seed(1)
    state = example()
    torch.manual_seed(1)
    assert torch.equal(state.layers[0][0], torch.randn(3, 4, 2))
    assert torch.equal(state.layers[0][1], torch.randn(3, 4, 5, dtype=torch.float64))


def test_select_copies_the_named_slots_in_order() -> None:
    state = example()
    for rows in ([2, 0, 2, 2], torch.tensor([2, 0, 2, 2]), torch.tensor([2, 0, 2, 2], dtype=torch.int32)):
        chosen = state.select(rows)
        assert chosen.slots == 4
        assert chosen.position.tolist() == [7, 5, 7, 7]
        assert torch.equal(chosen.layers[2][1], state.layers[2][1][[2, 0, 2, 2]])
        chosen.layers[0][0].zero_()
        assert state.layers[0][0].any()
    assert state.select([]).slots == 0


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (torch.tensor([True, False, True]), r"integers, got torch.bool: mask.nonzero\(\)"),
        ([True, False, True], "integers, got torch.bool"),
        ([0.0, 1.7], "integers, got torch.float32"),
        ([7], "at least 0 and below slots = 3, got 7"),
        ([0, -1], "at least 0 and below slots = 3, got -1"),
        (torch.tensor(1), r"one axis, got the shape \(\)"),
    ],
)
def test_rows_that_name_no_slots_are_refused(rows: torch.Tensor | list[int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        example().select(rows)


def test_put_overwrites_the_named_slots_in_place() -> None:
    state, other = example(), example()
    before, first = state.clone(), state.layers[0][0]
    state.put([2, 0], other.select([1, 1]))
    assert state.layers[0][0] is first
    assert state.position.tolist() == [6, 6, 6]
    assert_equal(state.select([0]), other.select([1]))
    assert_equal(state.select([2]), other.select([1]))
    assert_equal(state.select([1]), before.select([1]))


def test_a_state_that_does_not_fit_is_not_put() -> None:
    state = example()
    foreign = ModelState.from_layers([(torch.zeros(1, 3),)], torch.zeros(1, dtype=torch.int64))
    with pytest.raises(UserError, match="a state of 3 slots cannot be put into 1 rows"):
        state.put([0], state.clone())
    with pytest.raises(UserError, match="of another model"):
        state.put([0], foreign)
    with pytest.raises(UserError, match="below slots = 3, got 3"):
        state.put([3], state.select([0]))


def test_it_shows_itself_in_short() -> None:
    state = example()
    assert repr(state) == f"ModelState(slots=3, position=[5, 6, 7], nbytes={state.nbytes})"
    assert "position=[5, 6, 7, 5, …]" in repr(state.select([0, 1, 2, 0, 1]))
    assert "position=[on meta]" in repr(state.to("meta"))


def test_a_clone_shares_nothing() -> None:
    state = example()
    twin = state.clone()
    assert_equal(twin, state)
    for tensor in state.tensors().values():
        tensor.zero_()
    assert twin.position.tolist() == [5, 6, 7]
    assert all(part.any() for layer in twin.layers for part in layer if part.numel())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_a_copy_by_python_is_whole(copied: Callable[[ModelState], ModelState]) -> None:
    state = example()
    twin = copied(state)
    assert_equal(twin, state)
    twin.layers[0][0].fill_(3)
    assert (twin.clone().layers[0][0] == 3).all(), "the layers are the buffers"
    assert not (state.layers[0][0] == 3).any()


def test_another_device() -> None:
    moved = example().to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert moved.layers[2][1].device.type == "meta"
    state = example()
    assert_equal(state.to("cpu"), state)


def test_gradients_flow_through() -> None:
    part = torch.randn(2, 3, requires_grad=True)
    state = ModelState.from_layers([(part, torch.randn(2, 2))], torch.zeros(2, dtype=torch.int64))
    state.select([1]).clone().layers[0][0].sum().backward()
    assert part.grad is not None
    assert part.grad.tolist() == [[0.0] * 3, [1.0] * 3]


def test_bytes_of_a_released_size() -> None:
    with torch.device("meta"):
        model = LanguageModel(preset("mamba-130m")).bfloat16()
    a_sequence = 24 * 1536 * (16 * 4 + 3 * 2) + 8  # scan states in fp32, convolution states in bf16, the position
    assert model.init_state(1).nbytes == a_sequence
    assert model.init_state(128).nbytes == 128 * a_sequence
