"""Sampling: the distribution that is drawn from, the cuts, the determinism."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.generation.sampling import Sampler, draw, keep_min_p, keep_top_k, keep_top_p, uniform

LOGITS = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
DRAWS = 20_000


def frequencies(sampler: Sampler, logits: Tensor = LOGITS, draws: int = DRAWS) -> Tensor:
    tokens = sampler(logits.expand(draws, -1), torch.arange(draws))
    return tokens.bincount(minlength=logits.shape[-1]) / draws


def assert_frequencies(found: Tensor, expected: list[float], draws: int = DRAWS) -> None:
    """Each within five standard deviations of a binomial count, and what is excluded is never drawn."""
    for frequency, p in zip(found.tolist(), expected, strict=True):
        assert abs(frequency - p) <= 5 * math.sqrt(p * (1 - p) / draws)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Sampler(), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (Sampler(top_k=2), [5 / 7, 2 / 7, 0, 0, 0]),
        (Sampler(top_k=99), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (Sampler(top_p=0.69), [5 / 7, 2 / 7, 0, 0, 0]),
        (Sampler(top_p=0.71), [50 / 85, 20 / 85, 15 / 85, 0, 0]),
        (Sampler(top_p=1e-9), [1, 0, 0, 0, 0]),
        (Sampler(min_p=0.25), [50 / 85, 20 / 85, 15 / 85, 0, 0]),
        (Sampler(min_p=1.0), [1, 0, 0, 0, 0]),
        (Sampler(top_k=3, top_p=0.7), [5 / 7, 2 / 7, 0, 0, 0]),
        (Sampler(temperature=0.5), [p * p / 0.325 for p in (0.5, 0.2, 0.15, 0.1, 0.05)]),
        (Sampler(temperature=1e-30), [1, 0, 0, 0, 0]),
        (Sampler(temperature=0), [1, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampler: Sampler, expected: list[float]) -> None:
    assert_frequencies(frequencies(sampler), expected)


def test_a_high_temperature_makes_all_tokens_alike() -> None:
    assert_frequencies(frequencies(Sampler(temperature=1e6)), [0.2] * 5)


def test_order_of_the_vocabulary_does_not_matter() -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    found = frequencies(Sampler(top_p=0.71), LOGITS[order])
    assert_frequencies(found, [0, 50 / 85, 0, 15 / 85, 20 / 85])


def test_draws_depend_on_seed_and_position_only() -> None:
    logits, positions = torch.randn(64, 50), torch.arange(64)
    together = Sampler(seed=3)(logits, positions)
    alone = [int(Sampler(seed=3)(logits[i : i + 1], positions[i : i + 1])) for i in range(64)]
    assert together.tolist() == alone
    assert (Sampler(seed=4)(logits, positions) != together).any()


def test_numbers_are_uniform_and_independent_of_the_neighbouring_position_and_seed() -> None:
    positions = torch.arange(100_000)
    numbers = uniform(0, positions)
    assert numbers.min() > 0
    assert numbers.max() <= 1
    counts = (numbers * 20).ceil().long().bincount(minlength=21)[1:]
    chi_square = ((counts - 5000.0).square() / 5000).sum()
    assert chi_square < 50  # 19 degrees of freedom: 50 is passed once in 7,000 seeds
    for other in (uniform(0, positions + 1), uniform(1, positions), uniform(-1, positions), uniform(2**32, positions)):
        correlation = torch.corrcoef(torch.stack([numbers, other]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(100_000)


def test_numbers_are_those_of_splitmix64() -> None:
    """Against the generator written out in Python's own integers, at both ends of the range."""

    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    for seed in (0, 1, -1, 2**63 - 1, -(2**63)):
        for position in (0, 1, 2**40, 2**63 - 1):
            bits = mixed((mixed(seed % 2**64) + 0x9E3779B97F4A7C15 * position) % 2**64) >> 40
            assert uniform(seed, torch.tensor([position])).item() == (bits + 1) / 2**24


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_a_gpu_gives_the_same_numbers() -> None:
    positions = torch.arange(100_000)
    for seed in (0, -1, 2**63 - 1):
        assert torch.equal(uniform(seed, positions.cuda()).cpu(), uniform(seed, positions))


def test_the_smallest_and_the_largest_number_draw_tokens_that_are_possible() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    assert draw(logits, torch.tensor([2.0**-24])).item() == 1
    assert draw(logits, torch.tensor([1.0])).item() == 3


def test_cuts_keep_at_least_the_best_and_exactly_k_of_equals() -> None:
    equal = torch.zeros(1, 8)
    assert keep_top_k(equal, 3).isfinite().sum() == 3
    assert keep_top_p(equal, 0.5).isfinite().sum() == 4
    assert keep_top_p(equal, 1e-12).isfinite().sum() == 1
    assert keep_min_p(equal, 1.0).isfinite().sum() == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", 2**63),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{name} must be"):
        Sampler(**{name: value})  # pyright: ignore[reportArgumentType]
