"""The operators as torch's: opcheck, compilation, autocast, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selective_ssm.ops import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step
from tests.ops.cases import ScanCase

OPS = torch.ops.selective_ssm


def scan_arguments(case: ScanCase) -> tuple[Any, ...]:
    tensors, options = case.arguments()
    for name in ("B", "C"):
        tensors[name] = tensors[name].detach().unsqueeze(2).requires_grad_()
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    return (*(tensors.get(name) for name in names), options.get("cu_seqlens"), True, case.reverse, case.discretization)


@pytest.mark.parametrize("case", [ScanCase(), ScanCase(optional="", lengths=(3, 0, 9)), ScanCase(complex_state=True)])
def test_opcheck_scan(case: ScanCase) -> None:
    torch.library.opcheck(OPS.selective_scan, (*scan_arguments(case), True, True, None))


def test_opcheck_conv_and_steps() -> None:
    x, weight = torch.randn(2, 9, 3, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    torch.library.opcheck(
        OPS.causal_conv1d, (x, weight, None, torch.randn(2, 3, 3), None, "silu", False, True, True, None)
    )
    state, now = torch.randn(2, 3, 3), torch.randn(2, 3)
    torch.library.opcheck(OPS.causal_conv1d_step, (state, now, weight.detach(), None, "silu", False, None, None))
    A, B = -torch.rand(3, 4), torch.randn(2, 1, 4)
    step = (torch.randn(2, 3, 4), now, now, A, B, B, None, now, None, True, False, "zoh", None, None)
    torch.library.opcheck(OPS.selective_scan_step, step)


def test_compiles_whole() -> None:
    """One graph, forward and backward, with the eager result."""
    tensors, options = ScanCase(lengths=(5, 12)).arguments()
    weight = torch.randn(6, 4)

    def function(**tensors: torch.Tensor) -> torch.Tensor:
        x = causal_conv1d(tensors.pop("u"), weight, activation="silu", cu_seqlens=options["cu_seqlens"])
        out, final = selective_scan(x * 2, **tensors, **options, return_final_state=True)
        return out.sum() + final.sum()

    eager = torch.autograd.grad(function(**tensors), list(tensors.values()))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(**tensors), list(tensors.values())), eager, strict=True):
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-6)


def test_steps_compile_whole() -> None:
    A, now, maps, weight = -torch.rand(6, 4), torch.randn(2, 6), torch.randn(2, 4), torch.randn(6, 4)

    def function(conv: torch.Tensor, ssm: torch.Tensor) -> torch.Tensor:
        x = causal_conv1d_step(conv, now, weight, activation="silu")
        return selective_scan_step(ssm, x, now, A, maps, maps, delta_softplus=True)

    states = torch.randn(2, 6, 3), torch.randn(2, 6, 4)
    copies = states[0].clone(), states[1].clone()
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(*states)
    assert torch.equal(out, function(*copies))
    assert torch.equal(states[1], copies[1])


def test_autocast_casts_sequences_and_keeps_parameters() -> None:
    tensors, options = ScanCase().arguments()
    with torch.autocast("cpu", torch.bfloat16):
        out, final = selective_scan(**tensors, **options, return_final_state=True)
        assert causal_conv1d(tensors["u"], torch.randn(6, 4)).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    low = {name: x.bfloat16() if name in {"u", "delta", "B", "C", "z"} else x for name, x in tensors.items()}
    assert torch.equal(out, selective_scan(**low, **options))
    out.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in tensors.values())


def test_differentiating_twice_is_refused_in_words() -> None:
    tensors, options = ScanCase().arguments()
    (gradient,) = torch.autograd.grad(selective_scan(**tensors, **options).sum(), tensors["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan cannot be differentiated twice"):
        gradient.sum().backward()


def test_backward_is_deterministic() -> None:
    tensors, options = ScanCase(length=300, channels=32).arguments()
    runs = [torch.autograd.grad(selective_scan(**tensors, **options).sum(), list(tensors.values())) for _ in range(3)]
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


REFUSED = {
    "delta has shape (2, 36, 6); expected (B, L, D) with B = 2, L = 37, D = 6": {"delta": torch.zeros(2, 36, 6)},
    "z is on meta, the sequence on cpu": {"z": torch.zeros(2, 37, 6, device="meta")},
    "u has stride 37 along its last axis; expected 1": {"u": torch.zeros(2, 6, 37).transpose(1, 2)},
    "A has dtype float64; expected float32 or complex64": {"A": torch.zeros(6, 4, dtype=torch.float64)},
    "B has shape (2, 37, 5); expected (B, L, N) with B = 2, L = 37, N = 4": {"B": torch.zeros(2, 37, 5)},
    "B has G = 4 groups; expected a divisor of D = 6": {"B": torch.zeros(2, 37, 4, 4)},
    "B has 2 groups and C has 1; expected the same number": {"B": torch.zeros(2, 37, 2, 4)},
    "u has dtype int64": {"u": torch.zeros(2, 37, 6, dtype=torch.int64)},
    "initial_state has shape (1, 6, 4); expected (B, D, N)": {"initial_state": torch.zeros(1, 6, 4)},
    "discretization is 'bilinear'; expected 'euler' or 'zoh'": {"discretization": "bilinear"},
    "backend 'referense' does not exist (did you mean 'reference'?)": {"backend": "referense"},
    "packed sequences lie in one row, but the batch is 2": {"cu_seqlens": torch.tensor([0, 37])},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_scan_refuses_in_one_sentence(sentence: str) -> None:
    tensors, options = ScanCase().arguments()
    with pytest.raises((ValueError, TypeError)) as error:
        selective_scan(**tensors | options | REFUSED[sentence])
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("offsets", [[0, 5], [1, 37], [0, 20, 10, 37]])
def test_bad_offsets_are_refused_on_the_cpu(offsets: list[int]) -> None:
    tensors, options = ScanCase(batch=1, optional="").arguments()
    with pytest.raises(ValueError, match="expected non-decreasing values from 0 to L = 37"):
        selective_scan(**tensors, **options, cu_seqlens=torch.tensor(offsets))


def test_offsets_that_slip_through_never_leave_the_row() -> None:
    tensors, _ = ScanCase(lengths=(20, 17), optional="").arguments()
    bad = torch.tensor([5, 1000, -3], dtype=torch.int32)
    flat = [x.unsqueeze(2) if name in "BC" else x for name, x in tensors.items()]
    out, final, _ = OPS.selective_scan(*flat, None, None, None, None, bad, True, False, "euler", True, False, None)
    assert out.isfinite().all()
    assert final.isfinite().all()


@pytest.mark.parametrize(
    ("indices", "words"), [([0, 7], "names slot 7, but the state has 5"), ([2, 2], "a different slot")]
)
def test_bad_slots_are_refused(indices: list[int], words: str) -> None:
    now, maps = torch.zeros(2, 6), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=words):
        selective_scan_step(
            torch.zeros(5, 6, 4), now, now, -torch.ones(6, 4), maps, maps, state_indices=torch.tensor(indices)
        )
