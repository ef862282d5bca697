"""How a scan is dealt out over a CPU: functions of sizes alone, and rows that are cut into pieces against float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from selective_ssm.ops import native
from selective_ssm.ops.selective_scan import cpu_plan
from selective_ssm.ops.selective_scan.cpu_plan import LANES, LEAST_PIECE, TASKS, WIDTHS, WINDOW
from tests.ops import oracle
from tests.ops.cases import ScanCase
from tests.ops.launches import poison
from tests.ops.test_selective_scan_cpu import BRAIN, LONG_PACK, assert_case, needs_library, our_scan, plain_scan
from tests.ops.test_selective_scan_cuda import Case, results
from tests.tolerance import assert_close_to_float64

CHANNELS = ((1, 1), (5, 1), (6, 3), (16, 1), (48, 1), (64, 1), (66, 33), (256, 1), (1536, 1), (4096, 8))  # with groups
SIZES = list(itertools.product((1, 2, 3, 64), (1, 128, 129, 16000, 2**20), CHANNELS))


def test_plans_cover_everything() -> None:
    for batch, length, (channels, groups) in SIZES:
        layout, dealing = cpu_plan.deal_backward(batch, length, channels, groups)
        assert layout == cpu_plan.lay_out(batch, length, channels, groups)
        assert layout.width in WIDTHS
        assert layout.piece % WINDOW == 0
        pieces = layout.pieces(length)
        assert pieces == 1 or length / pieces > LEAST_PIECE - WINDOW
        rows, rest = divmod(dealing.parts, pieces)
        assert rest == 0
        assert 1 <= rows <= batch
        assert 1 <= dealing.group_tasks <= layout.blocks(channels, groups) // groups
        assert 1 <= dealing.slice <= -(-batch // rows) * -(-layout.piece // WINDOW)


def test_few_channels_make_narrow_blocks_and_very_few_cut_rows() -> None:
    def tasks(batch: int, length: int, channels: int) -> tuple[int, int, int]:
        layout = cpu_plan.lay_out(batch, length, channels, 1)
        return layout.width, layout.blocks(channels, 1), layout.pieces(length)

    assert tasks(1, 2**20, 1536) == (64, 24, 1)
    assert tasks(1, 2**20, 512) == (32, 16, 1)
    assert tasks(1, 2**20, 64) == (16, 4, 1)
    assert tasks(8, 2**20, 128) == (64, 2, 1)
    for channels in (1, 16, 48):
        _, blocks, pieces = tasks(1, 2**20, channels)
        assert blocks * pieces >= TASKS
    assert tasks(1, LEAST_PIECE, 1) == (LANES, 1, 1)


def test_a_layout_can_be_overridden_for_a_while() -> None:
    usual = cpu_plan.lay_out(1, 2048, 64, 1)
    with cpu_plan.overridden(piece=128):
        assert cpu_plan.lay_out(1, 2048, 64, 1) == usual._replace(piece=128)
        assert cpu_plan.deal_backward(1, 2048, 64, 1)[1].parts == 16
    assert cpu_plan.lay_out(1, 2048, 64, 1) == usual


SLOW = ScanCase(length=700, channels=21, state=5, delta_softplus=False)  # the first tokens are felt in the last pieces
CUT = {
    "a row": SLOW,
    "reverse": replace(SLOW, reverse=True, optional=""),
    "rows of whole pieces": replace(SLOW, length=512, batch=3),
    "a pack": replace(SLOW, lengths=LONG_PACK),
    "a pack, reverse, zero-order hold": replace(SLOW, lengths=LONG_PACK, reverse=True, discretization="zoh"),
    "sequences that end with pieces": replace(SLOW, lengths=(0, 128, 0, 128, 256, 0), reverse=True),
    "a pack that begins and ends with nothing": replace(SLOW, lengths=(0, 0, 400, 0, 0)),
    "zero-order hold": replace(SLOW, discretization="zoh"),
    "fixed B": replace(SLOW, fixed="B", reverse=True),
    "fixed C": replace(SLOW, fixed="C", discretization="zoh"),
    "fixed maps": replace(SLOW, fixed="BC", lengths=LONG_PACK),
    "groups": replace(SLOW, channels=42, groups=3),
    "many channels and states": replace(SLOW, channels=150, state=18, batch=1),
    "one channel and state": replace(SLOW, channels=1, state=1, batch=1, optional="i"),
    "bf16, parts of a projection": replace(SLOW, dtype=BRAIN, strided=True),
    "softplus": replace(SLOW, delta_softplus=True),
}


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("name", CUT)
def test_cut_rows_agree_with_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    layouts = ({"piece": 128}, {"piece": 256, "width": 16})
    with cpu_plan.overridden(**layouts[len(name) % 2]):
        assert_case(Case(CUT[name], delta_scale=1.0 if CUT[name].delta_softplus else 0.01))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=4).filter(lambda x: sum(x) > 128),
    shape=st.tuples(st.booleans(), st.integers(4, 20), st.integers(1, 6), st.sampled_from([None, 1, 3])),
    kind=st.tuples(st.sampled_from(["", "B", "C", "BC"]), st.sampled_from(["", "D", "z", "b", "i", "Dzbi"])),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["euler", "zoh"])),
    layout=st.tuples(st.sampled_from(WIDTHS), st.sampled_from([128, 384])),
)
@needs_library
def test_any_shape_in_pieces(
    lengths: list[int],
    shape: tuple[bool, int, int, int | None],
    kind: tuple[str, str],
    flags: tuple[bool, bool, bool, str],
    layout: tuple[int, int],
) -> None:
    packed, channels, state, groups = shape
    softplus, reverse, strided, discretization = flags
    scan = ScanCase(
        batch=1, length=sum(lengths), lengths=tuple(lengths) if packed else (), channels=channels * (groups or 1),
        state=state, groups=groups, fixed=kind[0], optional=kind[1], delta_softplus=softplus, reverse=reverse,
        discretization=discretization, strided=strided,
    )  # fmt: skip
    with cpu_plan.overridden(width=layout[0], piece=layout[1]):
        assert_case(Case(scan, delta_scale=1.0 if softplus else 0.02))


@needs_library
@pytest.mark.parametrize("scan", [SLOW, replace(SLOW, lengths=LONG_PACK, reverse=True)], ids=["rows", "a pack"])
def test_in_pieces_the_number_of_threads_changes_no_bit(scan: ScanCase) -> None:
    case = Case(replace(scan, channels=70, state=16), delta_scale=0.01)
    try:
        with cpu_plan.overridden(piece=128):
            torch.set_num_threads(1)
            first = results(case, our_scan, torch.clone)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert all(map(torch.equal, results(case, our_scan, torch.clone), first))
    finally:
        torch.set_num_threads(1)


@needs_library
def test_a_long_narrow_row_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    function = native.function
    monkeypatch.setattr(native, "function", lambda name: (called.append(name), function(name))[1])
    case = Case(replace(SLOW, length=2 * LEAST_PIECE + 5, channels=3, batch=1, optional="i"), delta_scale=1e-3)
    assert_case(case)
    kernels = ["selective_scan_forward", "selective_scan_backward"]
    assert called == [name for kernel in kernels for name in ("selective_scan_hand_over", kernel)]


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["u", "delta", "B", "z"])
@pytest.mark.parametrize("reverse", [False, True])
def test_in_pieces_what_is_not_a_number_stays_in_its_own_sequence(name: str, value: float, reverse: bool) -> None:
    tensors, options = ScanCase(lengths=(100, 0, 400, 130, 5), channels=21, state=5, reverse=reverse).arguments()

    def run(function: Callable[..., Any]) -> list[Tensor]:
        outputs = function(**tensors, **options)
        weights = [torch.ones_like(x) for x in outputs]
        return [*outputs, *torch.autograd.grad(outputs, [tensors[k] for k in ("u", "initial_state")], weights)]

    with cpu_plan.overridden(piece=128):
        clean = run(our_scan)
        with torch.no_grad():
            tensors[name][0, 300] = value
        dirty, plain = run(our_scan), run(plain_scan)
    for k in (0, 1):
        assert torch.equal(dirty[k].isfinite(), plain[k].isfinite())
    for k in (0, 2):  # out and the gradient of u
        assert torch.equal(dirty[k][:, :100], clean[k][:, :100])
        assert torch.equal(dirty[k][:, 500:], clean[k][:, 500:])
    for k in (1, 3):  # final state and the gradient of the initial one
        assert torch.equal(dirty[k][[0, 1, 3, 4]], clean[k][[0, 1, 3, 4]])


@needs_library
@pytest.mark.parametrize(("rate", "start"), [(1.6, 1e-35), (-1.6, 1e35), (3.0, 0.0)])
def test_states_that_grow_or_fade_by_more_than_a_number_holds(rate: float, start: float) -> None:
    """From piece to piece e^(+-160), which times the state is a number still; and nothing grows out of nothing."""
    tensors, _ = ScanCase(batch=1, length=384, channels=4, state=1, optional="i").arguments()
    with torch.no_grad():
        tensors["A"].fill_(rate)
        tensors["delta"].fill_(100 / 128)
        tensors["delta"][:, :128], tensors["delta"][:, 256:] = 0, 0
        tensors["u"].fill_(0)
        tensors["initial_state"].fill_(start)

    def run(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        inputs = {name: oracle.cast(x, dtype) for name, x in tensors.items()}
        outputs = function(**inputs)
        weights = [torch.full_like(x, math.exp(-abs(rate) * 50)) for x in outputs]
        wanted = [inputs[name] for name in ("u", "initial_state")]
        return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, wanted, weights))]

    exact, plain = run(plain_scan, torch.float64), run(plain_scan, torch.float32)
    with cpu_plan.overridden(piece=128):
        ours = run(our_scan, torch.float32)
    for x, reference, truth in zip(ours, plain, exact, strict=True):
        assert_close_to_float64(x, reference, truth, summed=384)
