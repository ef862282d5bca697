"""Sampling: against the plainest way, the distribution that is drawn from, and rows that do not know of each other."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.generation.sampling import ALL, Needs, Sampling, Settings
from selective_ssm.generation.sampling import sample as sample_with_logprobs
from tests.generation import oracle

LOGITS = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
DRAWS = 20_000
MIXED = [
    Sampling(temperature=0),
    Sampling(),
    Sampling(temperature=0.7, top_k=5),
    Sampling(top_p=0.8, min_p=0.02, seed=-3),
    Sampling(top_k=9, top_p=0.9, repetition_penalty=1.3),
    Sampling(temperature=0, repetition_penalty=2.0),
    Sampling(temperature=1.4, min_p=0.1, repetition_penalty=0.8, seed=2**63 - 1),
]


def sample(logits: Tensor, settings: Settings, position: Tensor, needs: Needs, seen: Tensor | None = None) -> Tensor:
    """The tokens alone."""
    return sample_with_logprobs(logits, settings, position, needs, seen)[0]


def frequencies(sampling: Sampling, logits: Tensor = LOGITS, draws: int = DRAWS) -> Tensor:
    settings = Settings.of([sampling] * draws)
    tokens = sample(logits.expand(draws, -1), settings, torch.arange(draws), sampling.needs)
    return tokens.bincount(minlength=logits.shape[-1]) / draws


def assert_frequencies(found: Tensor, expected: list[float], draws: int = DRAWS) -> None:
    """Each within five standard deviations of a binomial count, and what is excluded is never drawn."""
    for frequency, p in zip(found.tolist(), expected, strict=True):
        assert abs(frequency - p) <= 5 * math.sqrt(p * (1 - p) / draws)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (Sampling(top_k=2), [5 / 7, 2 / 7, 0, 0, 0]),
        (Sampling(top_k=99), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (Sampling(top_p=0.69), [5 / 7, 2 / 7, 0, 0, 0]),
        (Sampling(top_p=0.71), [50 / 85, 20 / 85, 15 / 85, 0, 0]),
        (Sampling(top_p=1e-9), [1, 0, 0, 0, 0]),
        (Sampling(min_p=0.25), [50 / 85, 20 / 85, 15 / 85, 0, 0]),
        (Sampling(min_p=1.0), [1, 0, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.7), [5 / 7, 2 / 7, 0, 0, 0]),
        (Sampling(temperature=0.5), [p * p / 0.325 for p in (0.5, 0.2, 0.15, 0.1, 0.05)]),
        (Sampling(temperature=1e-50), [1, 0, 0, 0, 0]),
        (Sampling(temperature=0), [1, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling: Sampling, expected: list[float]) -> None:
    assert_frequencies(frequencies(sampling), expected)


def test_a_high_temperature_makes_all_tokens_alike() -> None:
    assert_frequencies(frequencies(Sampling(temperature=1e6)), [0.2] * 5)


def test_order_of_the_vocabulary_does_not_matter() -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    found = frequencies(Sampling(top_p=0.71), LOGITS[order])
    assert_frequencies(found, [0, 50 / 85, 0, 15 / 85, 20 / 85])


@pytest.mark.parametrize("sampling", MIXED, ids=str)
def test_draws_over_many_seeds_pass_a_chi_square_test(sampling: Sampling) -> None:
    logits, seen = 2 * torch.randn(40, dtype=torch.float64), set(range(0, 40, 3))
    rows = [replace(sampling, seed=seed) for seed in range(DRAWS)]
    seen_rows = torch.zeros(40, dtype=torch.bool)
    seen_rows[list(seen)] = True
    tokens = sample(
        logits.expand(DRAWS, -1),
        Settings.of(rows),
        torch.full((DRAWS,), 9),
        sampling.needs,
        seen_rows.expand(DRAWS, -1),
    )
    expected = oracle.candidates(logits.tolist(), sampling, seen)
    counts = tokens.bincount(minlength=40).tolist()
    assert {id for id, count in enumerate(counts) if count} <= set(expected)
    likely = {id: p for id, p in expected.items() if p * DRAWS >= 5}
    chi_square = sum((counts[id] - p * DRAWS) ** 2 / (p * DRAWS) for id, p in likely.items())
    degrees = max(len(likely) - 1, 1)
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)  # mean and deviation of that distribution


@given(
    st.integers(0, 2**32),
    st.sampled_from([0, 0.3, 1.0, 2.5]),
    st.integers(0, 70),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5]),
    st.sampled_from([0.7, 1.0, 1.5]),
    st.integers(-(2**63), 2**63 - 1),
)
def test_tokens_are_those_of_the_plainest_way(
    key: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(key)
    logits = 3 * torch.randn(1, 60, dtype=torch.float64, generator=generator)
    seen = torch.rand(1, 60, generator=generator) < 0.3
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty, seed=seed
    )
    sampling = replace(sampling, **vars_as_fp32(sampling))
    found = sample(logits, Settings.of([sampling]), torch.tensor([key % 1000]), sampling.needs, seen).item()
    there = set(seen[0].nonzero()[:, 0].tolist())
    assert found == oracle.drawn(logits[0].tolist(), sampling, key % 1000, there)


def vars_as_fp32(sampling: Sampling) -> dict[str, float]:
    """What is kept in fp32, as it is then."""
    return {name: torch.tensor(vars(sampling)[name]).item() for name in ("temperature", "repetition_penalty")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours_nor_on_what_they_need(dtype: torch.dtype) -> None:
    """Rounded to bf16 many logits are equal, and which of them are cut must not depend on how they are ranked."""
    logits = torch.randn(len(MIXED), 300).to(torch.bfloat16).to(dtype)
    seen = torch.rand(len(MIXED), 300) < 0.2
    together_needs = Needs.of_all(one.needs for one in MIXED)
    assert together_needs == Needs(draw=True, ranked=ALL, likely=True, penalty=True)
    for position in range(20):
        positions = torch.full((len(MIXED),), position)
        together = sample(logits, Settings.of(MIXED), positions, together_needs, seen)
        for row, one in enumerate(MIXED):
            alone = slice(row, row + 1)
            for beside in MIXED:
                needs = Needs.of_all([one.needs, beside.needs])
                token = sample(logits[alone], Settings.of([one]), positions[alone], needs, seen[alone])
                assert token.item() == together[row].item(), (one, needs)


def test_the_seed_and_the_position_decide() -> None:
    logits, positions = torch.randn(64, 50), torch.arange(64)
    first, again, other = (
        sample(logits, Settings.of([Sampling(seed=s)] * 64), positions, Needs(True)) for s in (3, 3, 4)
    )
    assert first.tolist() == again.tolist() != other.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_a_gpu_chooses_the_same_tokens() -> None:
    """Weights may differ in their last bits, which moves a token once in millions."""
    logits, positions = 3 * torch.randn(700, 500), torch.arange(700)
    rows, seen = MIXED * 100, torch.rand(700, 500) < 0.1
    needs = Needs.of_all(one.needs for one in MIXED)
    there = sample(
        logits.cuda(), Settings(*(x.cuda() for x in Settings.of(rows))), positions.cuda(), needs, seen.cuda()
    )
    assert torch.equal(there.cpu(), sample(logits, Settings.of(rows), positions, needs, seen))


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
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("seed", 2**63),
        ("seed", 1.0),
        ("top_k", 5.0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{name} must be"):
        Sampling(**{name: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("top_k", [2**62 + 1, 10**20, np.int64(2)], ids=str)
def test_any_integer_will_do_for_top_k(top_k: int) -> None:
    drawn = frequencies(Sampling(top_k=top_k), torch.zeros(3)).count_nonzero()
    assert drawn == min(int(top_k), 3)
