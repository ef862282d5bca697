"""The CUDA kernel that chooses tokens against the reference: in the emulator, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from selective_ssm.ops import nvrtc
from selective_ssm.ops.sample import cuda, reference, sample
from selective_ssm.ops.sample.reference import SHARE_BITS
from tests.ops import emulator
from tests.ops.guards import Guards
from tests.ops.launches import emulate, poison
from tests.ops.test_sample import ALL, EVERYTHING, MIXED, Row, chosen, settings
from tests.ops.wanted import Wanted, wanted_by
from tests.tolerance import assert_close_to_float64

needs_emulator = pytest.mark.skipif(emulator.explain() is not None, reason=str(emulator.explain()))
needs_gpu = pytest.mark.skipif(nvrtc.explain() is not None, reason=str(nvrtc.explain()))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WEIGHT = 2.0**34
NEAR = 2.0**-20
"""Share of a sum of weights by which exponentials that are rounded otherwise may move it."""


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, cuda)


@pytest.fixture
def same_exponential(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference rounds exp as the emulated kernel does: by the C library's function."""
    expf = ctypes.CDLL(ctypes.util.find_library("m")).expf
    expf.restype, expf.argtypes = ctypes.c_float, [ctypes.c_float]

    def weights_of(logits: Tensor, temperature: Tensor) -> Tensor:
        shifted = logits - logits.amax(dim=-1, keepdim=True)
        shifted = shifted / temperature.clamp_min(torch.finfo(FP32).tiny)[:, None]
        return torch.tensor([[int(expf(x) * WEIGHT) for x in row] for row in shifted.tolist()])

    monkeypatch.setattr(reference, "weights_of", weights_of)


def drawn(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, where tokens were seen, positions."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    logits[logits < -7] = -math.inf
    seen = torch.rand(rows, vocabulary, generator=generator) < 0.2
    return logits.to(dtype), seen, torch.randint(2**40, (rows,), generator=generator)


def both(logits: Tensor, rows: list[Row], position: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The kernel's tokens and the reference's."""
    kernel, plain = (chosen(logits, rows, position, seen, **EVERYTHING, backend=name) for name in ("cuda", "reference"))
    return kernel, plain


@needs_emulator
@pytest.mark.usefixtures("emulated", "same_exponential")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("vocabulary", [1, 7, 257, 1000, 5003])
def test_tokens_are_the_references(vocabulary: int, dtype: torch.dtype) -> None:
    """With the same exponentials every whole number is the same, and so is every token."""
    for turn in range(len(MIXED)):
        rows = (MIXED[turn:] + MIXED)[: 1 + turn % 5]
        logits, seen, position = drawn(len(rows), vocabulary, dtype)
        kernel, plain = both(logits, rows, position + turn, seen)
        assert kernel.equal(plain), rows


@needs_emulator
@pytest.mark.usefixtures("emulated", "same_exponential")
@pytest.mark.parametrize("values", [1, 2, 20])
def test_ties_are_cut_as_the_references(values: int) -> None:
    """Many tokens are alike, so that every cut falls among equals; zeros have either sign."""
    cuts = (Row(top_k=k, top_p=p, seed=k) for k in (1, 100, 501, 1003, ALL) for p in (0.001, 0.6, 1.0))
    rows = [Row(temperature=0), *cuts]
    logits = (torch.randint(values, (len(rows), 1003)) / 2).to(BF16)
    logits = torch.where((logits == 0) & (torch.arange(1003) < 500), -logits, logits)
    for position in torch.arange(10)[:, None]:
        kernel, plain = both(logits, rows, position.expand(len(rows)))
        assert kernel.equal(plain)


@needs_emulator
@pytest.mark.usefixtures("emulated", "same_exponential")
def test_equals_that_stay_are_counted_over_all_of_a_row() -> None:
    """Of the less likely half of 700 tokens five stay, the first ones: within an octet, and none in those after it."""
    logits = torch.full((1, 20_000), -math.inf)
    logits[:, :700] = torch.randint(2, (700,)).float()
    row = Row(top_k=int((logits == 1).sum()) + 5)
    rows = [row._replace(seed=seed) for seed in range(30)]
    kernel, plain = both(logits.expand(30, -1), rows, torch.zeros(30, dtype=torch.int64))
    assert kernel.equal(plain)


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_other_exponentials_move_a_token_only_over_a_border(dtype: torch.dtype) -> None:
    assert_near_the_reference(300, 257, dtype, "cpu")


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("vocabulary", [1, 257, 50277, 262144])
def test_tokens_are_near_the_references_on_a_gpu(
    vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    assert_near_the_reference(60, vocabulary, dtype, "cuda")


def assert_near_the_reference(count: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
    """Where tokens differ, a sum of weights was close to the share drawn, or to that of top-p."""
    rows = [row._replace(seed=seed) for seed in range(count // len(MIXED)) for row in MIXED]
    logits, seen, position = (x.to(device) for x in drawn(len(rows), vocabulary, dtype))
    real, whole = (x.to(device) for x in settings(rows))
    kernel, plain = (
        sample(logits, real, whole, position, seen, **EVERYTHING, backend=name)[0] for name in ("cuda", "reference")
    )
    scores = reference.penalised(logits.float(), seen, real[:, 1])
    weights = reference.weights_of(scores, real[:, 0])
    kept = reference.keep_likely(reference.keep_best(weights, whole[:, 1], whole[:, 2], ALL), whole[:, 3])
    for i in (kernel != plain).nonzero()[:, 0].tolist():
        number = reference.uniform(whole[i, 0], position[i])
        ranked = weights[i].sort(descending=True).values[: rows[i].top_k]
        margins = [margin(kept[i], number), margin(ranked, whole[i, 2])]
        assert real[i, 0] > 0
        assert min(margins) < NEAR, rows[i]


def margin(weights: Tensor, share: Tensor) -> float:
    """How far from a share of the sum the nearest of the sums before it is."""
    sums = weights.cumsum(0)
    return float((sums - reference.part(sums[-1], share)).abs().min() / sums[-1])


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_log_probabilities_agree_with_float64(dtype: torch.dtype) -> None:
    logits, seen, position = drawn(len(MIXED), 1000, dtype)
    arguments = (*settings(MIXED), position, seen)
    tokens, found = sample(logits, *arguments, **EVERYTHING, logprobs=True, backend="cuda")
    plain = reference.log_probabilities(logits.float(), tokens)
    exact = logits.double().log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]
    assert_close_to_float64(found, plain, exact)
    greedy, alone = sample(logits, *arguments[:3], draws=False, logprobs=True, backend="cuda")
    assert greedy.equal(logits.float().argmax(-1))
    assert_close_to_float64(alone, plain, logits.double().log_softmax(dim=-1).amax(-1))


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_row_depends_neither_on_its_neighbours_nor_on_what_they_need(dtype: torch.dtype) -> None:
    logits, seen, position = drawn(len(MIXED), 1003, dtype)
    together = chosen(logits, MIXED, position, seen, **EVERYTHING, backend="cuda")
    for i, row in enumerate(MIXED):
        one = slice(i, i + 1)
        penalised = None if row.penalty == 1 else seen[one]
        alone = chosen(logits[one], [row], position[one], penalised, **row.needs(), backend="cuda")
        assert alone.item() == together[i].item(), row


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_reads_views_and_nothing_beside_them(dtype: torch.dtype) -> None:
    guards = Guards()
    logits, seen, position = drawn(len(MIXED), 1003, dtype)
    count = len(MIXED)
    expected = chosen(logits, MIXED, position, seen, **EVERYTHING, backend="cuda")

    def wide(x: Tensor, row: int, offset: int = 0) -> Tensor:
        return guards.buffer((count, 1003 + offset), (row, 1), x.dtype, "cpu")[:, offset:].copy_(x)

    marked = torch.full((count, 1100), True)
    marked[:, 40:1043] = seen
    real, whole = (guards.copy(x, "cpu") for x in settings(MIXED))
    for row, offset in ((1008, 0), (1011, 0), (1016, 8), (1016, 3)):
        arguments = (wide(logits, row, offset), real, whole, position, marked[:, 40:1043])
        with guards.allocating():
            assert sample(*arguments, **EVERYTHING, logprobs=True, backend="cuda")[0].equal(expected)
    fenced = (emulator.fenced(x) for x in (logits, real, whole, position, seen))
    assert sample(*fenced, **EVERYTHING, backend="cuda")[0].equal(expected)
    assert guards.intact()


@needs_emulator
@pytest.mark.usefixtures("emulated", "same_exponential")
def test_rows_name_their_settings_and_never_leave_them() -> None:
    logits, seen, position = drawn(len(MIXED), 257, BF16)
    arguments = (logits[:4], *settings(MIXED), torch.cat([position, position[:2] + 1]), seen)
    rows = torch.tensor([4, -1, 0, -len(MIXED)])
    kernel, plain = (sample(*arguments, rows=rows, **EVERYTHING, backend=name)[0] for name in ("cuda", "reference"))
    assert kernel.equal(plain)
    beyond = torch.tensor([2**40, -(2**40), len(MIXED), -100])
    tokens, _ = sample(*arguments, rows=beyond, **EVERYTHING, backend="cuda")
    assert all(0 <= token < 257 for token in tokens.tolist())


@needs_emulator
@pytest.mark.usefixtures("emulated")
def test_what_is_not_a_number_counts_as_impossible() -> None:
    logits, seen, position = drawn(len(MIXED), 40, FP32)
    odd = torch.where(torch.rand(logits.shape) < 0.5, math.nan, logits)
    odd[:, 7] = 1
    tokens = chosen(odd, MIXED, position, seen, **EVERYTHING, backend="cuda")
    assert odd.gather(-1, tokens[:, None]).isfinite().all()
    for value in (math.nan, math.inf, -math.inf):
        for needs in (EVERYTHING, {"draws": True}, {"draws": False}):
            tokens = chosen(torch.full((len(MIXED), 9), value), MIXED, position, seen[:, :9], **needs, backend="cuda")
            assert all(0 <= token < 9 for token in tokens.tolist())


@needs_emulator
def test_threads_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, seen, position = drawn(len(MIXED), 1003, BF16)
    runs: list[Tensor] = []
    for order in emulator.ORDERS:
        with monkeypatch.context() as patch:
            emulate(patch, cuda, order=order)
            tokens, found = sample(
                logits, *settings(MIXED), position, seen, **EVERYTHING, logprobs=True, backend="cuda"
            )
            runs.append(torch.stack([tokens.double(), found.double()]))
    assert all(run.equal(runs[0]) for run in runs[1:])


@needs_emulator
@pytest.mark.usefixtures("emulated")
def test_shares_of_large_totals_are_exact() -> None:
    """2¹⁷ tokens alike weigh 2⁵¹: a share of top-p, and of what it leaves, falls where it should."""
    row = Row(top_p=0.5, seed=3)
    logits, position = torch.zeros(1, 2**17), torch.tensor([5])
    number = int(reference.uniform(torch.tensor(reference.stream_of(3)), position))
    expected = math.ceil(number * 2**16 / 2**SHARE_BITS) - 1
    assert chosen(logits, [row], position, **row.needs(), backend="cuda").item() == expected


def test_the_kernel_is_compiled_for_what_is_needed() -> None:
    logits, seen, position = drawn(2, 1003, BF16)

    def launched(logits: Tensor = logits, seen: Tensor | None = None, **needs: Any) -> Wanted:
        arguments = (logits, *settings([Row()] * len(logits)), position[: len(logits)], seen)
        (one,) = wanted_by(lambda: sample(*arguments, **needs, backend="cuda"), cuda)
        return one

    def macros(**needs: Any) -> dict[str, Any]:
        return dict(launched(**needs).defines)

    nothing = {"NUMBER": "bf16", "DRAWS": 0, "RANKED": 0, "PENALTY": 0, "LOGPROBS": 0, "ALIGNED": 0}
    assert macros(draws=False, ranked=7) == nothing
    assert macros(draws=True, ranked=7) == {**nothing, "DRAWS": 1, "RANKED": 1}
    assert macros(draws=True, likely=True) == {**nothing, "DRAWS": 1}
    assert macros(draws=False, seen=seen, logprobs=True) == {**nothing, "PENALTY": 1, "LOGPROBS": 1}
    assert macros(draws=False, logits=logits[:, :1000].clone()) == {**nothing, "ALIGNED": 1}
    assert launched(draws=True).grid == (2, 1, 1)
    assert launched(draws=True).waits
