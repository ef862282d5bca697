"""What is computed from parameters alone is computed once, and nothing else is."""

from __future__ import annotations

import torch
from torch import Tensor

from selective_ssm.models import LanguageModel, LanguageModelConfig
from selective_ssm.ops.constants import Constants


def test_what_parameters_make_is_remembered_and_all_else_runs_again() -> None:
    weight, x = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])

    def function() -> Tensor:
        scale = weight.exp()[1:].log()  # operators on what was computed, views too
        return scale * x + x.square()

    constants = Constants([weight])
    assert constants.learn(function).tolist() == [15.0, 24.0]
    weight.fill_(3)
    x.copy_(torch.tensor([1.0, 2.0]))
    for _ in range(2):
        assert constants.serve(function).tolist() == [3.0, 8.0], "the scale is as it was"
    assert constants.learn(function).tolist() == [4.0, 10.0]


def test_what_writes_or_takes_no_tensor_runs_each_time() -> None:
    weight, count = torch.zeros(2), torch.zeros(())

    def function() -> Tensor:
        count.add_(1)
        return torch.arange(2.0).add_(weight) + count

    constants = Constants([weight])
    assert constants.learn(function).tolist() == [1.0, 2.0]
    assert constants.serve(function).tolist() == [2.0, 3.0]


def test_memory_shaped_like_a_parameter_is_no_constant() -> None:
    """Nor is what is computed from what lies there, nor random numbers."""
    weight, x = torch.ones(64), torch.zeros(64)

    def function() -> tuple[Tensor, Tensor]:
        return weight.new_empty(64).copy_(x) * 2, torch.rand_like(weight)

    constants = Constants([weight])
    _, first = constants.learn(function)
    x.fill_(3)
    doubled, second = constants.serve(function)
    assert doubled.eq(6).all()
    assert not first.equal(second)


def test_an_empty_parameter_does_not_make_all_empty_tensors_constant() -> None:
    weight, sizes = torch.empty(0), [1]

    def function() -> Tensor:
        return torch.empty(0).new_zeros(sizes[0])

    constants = Constants([weight])
    constants.learn(function)
    sizes[0] = 3
    assert constants.serve(function).shape == (3,)


def test_the_step_of_a_model_is_the_same() -> None:
    model = LanguageModel(LanguageModelConfig(d_model=16, n_layer=2, vocab_size=11)).to(torch.bfloat16)
    before, ids = model.read(torch.randint(11, (3, 5))), torch.tensor([1, 2, 3])

    def function() -> Tensor:
        return model.backbone.step(model.embedding(ids), before.clone().layers)

    with torch.no_grad():
        expected, constants = function(), Constants(model.parameters())
        for way in (constants.learn, constants.serve, constants.serve):
            assert torch.equal(way(function), expected)
