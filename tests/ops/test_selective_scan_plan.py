"""How a scan is laid out over a GPU: functions of sizes alone, and what the kernels then ask for."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from selective_ssm.ops import selective_scan
from selective_ssm.ops.selective_scan import cuda, plan
from selective_ssm.ops.selective_scan.plan import CHUNK, THREADS, plan_backward, plan_forward
from tests.ops.cases import ScanCase
from tests.ops.trial import LANES
from tests.ops.wanted import Wanted, wanted_by

MOST_SHARED = (227 * 1024, 99 * 1024)  # of a block: the most and the least among the GPUs that serve
MOST_BLOCKS = 2**31 - 1

SEQUENCES = (1, 2, 3, 64, 5000)
LENGTHS = (1, 2, 64, 65, 2048, 131072, 2**20, 2**31 + 5)
CHANNELS = ((1, 1), (5, 1), (6, 3), (64, 1), (136, 17), (2048, 1), (4096, 8), (20000, 1))  # with groups
MULTIPROCESSORS = (1, 46, 132)
SIZES = list(itertools.product(SEQUENCES, LENGTHS, CHANNELS, MULTIPROCESSORS))


@pytest.mark.parametrize("make", [plan_forward, plan_backward])
def test_plans_cover_everything_and_can_be_launched(make: type[plan.Plan]) -> None:
    for sequences, length, (channels, groups), multiprocessors in SIZES:
        chosen = make(sequences, length, channels, groups, multiprocessors)
        assert THREADS % chosen.lanes == 0
        assert chosen.lanes in LANES
        assert CHUNK % chosen.steps == 0
        assert 1 <= chosen.pieces <= max(1, -(-length // CHUNK))
        blocks = chosen.blocks(channels, groups)
        assert 0 <= blocks * chosen.channels - channels < groups * chosen.channels
        assert blocks * chosen.pieces * sequences <= MOST_BLOCKS
        lots = plan.slots(chosen, sequences, channels, groups, multiprocessors)
        assert 1 <= lots <= sequences


@pytest.mark.parametrize("make", [plan_forward, plan_backward])
def test_a_long_narrow_scan_is_cut_until_it_fills_the_machine(make: type[plan.Plan]) -> None:
    for multiprocessors in (46, 132):
        chosen = make(1, 2**20, 1, 1, multiprocessors)
        assert chosen.pieces * THREADS // 32 >= plan.WARPS_A_MULTIPROCESSOR * multiprocessors * 0.9
    assert make(1, 2**20, 1, 1, 132).pieces > make(1, 2**20, 512, 1, 132).pieces > 1
    assert make(64, 4096, 4096, 1, 132).pieces == 1
    assert make(1, CHUNK, 1, 1, 132).pieces == 1


def test_more_lanes_share_a_channel_where_there_are_few() -> None:
    lanes = [plan_forward(1, 2048, 2**i, 1, 132).lanes for i in reversed(range(20))]
    assert lanes == sorted(lanes)
    assert set(lanes) == set(LANES)
    assert lanes[0] < lanes[-1]


def test_a_plan_can_be_overridden_for_a_while() -> None:
    usual = plan_forward(8, 2048, 2048, 1, 132)
    with plan.overridden(lanes=8, pieces=7):
        assert plan_forward(8, 2048, 2048, 1, 132) == plan.Plan(lanes=8, pieces=7)
        assert plan_backward(8, 2048, 2048, 1, 132).pieces == 7
    assert plan_forward(8, 2048, 2048, 1, 132) == usual


def test_overrides_nest() -> None:
    def planned() -> tuple[int, int]:
        chosen = plan_forward(8, 2048, 2048, 1, 132)
        return chosen.lanes, chosen.pieces

    usual = planned()
    with plan.overridden(lanes=8, pieces=7):
        with plan.overridden(pieces=3):
            assert planned() == (8, 3)
        assert planned() == (8, 7)
        with contextlib.suppress(KeyError), plan.overridden(lanes=4):
            assert planned() == (4, 7)
            raise KeyError
        assert planned() == (8, 7)
    assert planned() == usual


def wanted(case: ScanCase, multiprocessors: int = 132, most_shared: int = MOST_SHARED[0]) -> list[Wanted]:
    """The kernels of a forward and a backward pass."""
    tensors, options = case.arguments()

    def call() -> None:
        out, final = selective_scan(**tensors, **options, return_final_state=True, backend="cuda")
        torch.autograd.backward((out, final), (torch.zeros_like(out), torch.zeros_like(final)))

    return wanted_by(call, cuda, multiprocessors=multiprocessors, most_shared=most_shared)


@pytest.mark.parametrize("most_shared", MOST_SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_block_has_more_shared_memory_than_there_is(dtype: torch.dtype, most_shared: int) -> None:
    for state, lanes, zoh in itertools.product((1, 3, 16, 17, 40, 255, 256), LANES, ("euler", "zoh")):
        case = ScanCase(batch=1, length=2, channels=8, state=state, dtype=dtype, discretization=zoh)
        with plan.overridden(lanes=lanes, pieces=2):
            asked = wanted(case, most_shared=most_shared)
        assert len(asked) == 7
        assert max(one.shared for one in asked) <= most_shared
        assert all(one.shared == 0 for one in asked if "hand_over" in one.name)


def test_a_sequence_is_run_once_unless_it_is_cut() -> None:
    whole = [one.name for one in wanted(ScanCase(batch=64, length=70, channels=64), multiprocessors=1)]
    assert whole == ["selective_scan_forward", "selective_scan_backward", "sum_parts"]
    cut = wanted(ScanCase(batch=1, length=16 * CHUNK, channels=8))
    assert [one.name for one in cut] == [
        "selective_scan_summary",
        "selective_scan_hand_over",
        "selective_scan_forward",
        "selective_scan_backward_summary",
        "selective_scan_backward_hand_over",
        "selective_scan_backward",
        "sum_parts",
    ]
    assert all(one.grid[0] > 1 for one in cut if "hand_over" not in one.name)


def test_what_is_kept_for_the_backward_pass_is_small() -> None:
    """At N = 16 at most half of one bfloat16 (B, L, D) tensor, whatever the plan and the pack."""
    tensors, options = ScanCase(length=2000, channels=8, state=16, groups=1, dtype=torch.bfloat16).arguments()
    inputs = cuda.Inputs(**{name: tensors.get(name, options.get(name)) for name in cuda.Inputs._fields})
    shape = torch.Size(cuda.saved_shape(inputs))
    assert 4 * shape.numel() <= 0.5 * 2 * tensors["u"].numel()
