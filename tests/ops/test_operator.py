"""The operators as torch's: opcheck, compilation, autocast, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from selective_ssm.ops import (
    causal_conv1d,
    causal_conv1d_step,
    checks,
    dispatch,
    nvrtc,
    operator,
    selective_scan,
    selective_scan_step,
)
from tests.ops.cases import ScanCase

OPS = torch.ops.selective_ssm


def scan_arguments(case: ScanCase) -> tuple[Any, ...]:
    tensors, options = case.arguments()
    for name in ("B", "C"):
        if tensors[name].dim() == 3:
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own imports
def test_inductor_gives_the_eager_result() -> None:
    tensors, options = ScanCase(optional="Dzb").arguments()

    def function(**tensors: torch.Tensor) -> torch.Tensor:
        x = causal_conv1d(tensors.pop("u"), torch.ones(6, 4), activation="silu")
        return selective_scan(x * 2, **tensors, **options).transpose(1, 2).sin().sum()

    eager = torch.autograd.grad(function(**tensors), list(tensors.values()))
    compiled = torch.compile(function, fullgraph=True)
    for x, y in zip(torch.autograd.grad(compiled(**tensors), list(tensors.values())), eager, strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-5)


LAYOUTS = {
    "as it is": lambda x: x,
    "length inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda x: x[:1, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [ScanCase(), ScanCase(lengths=(3, 9)), ScanCase(groups=2, fixed="C", strided=True)])
def test_results_lie_in_memory_as_their_fakes_do(case: ScanCase, layout: str) -> None:
    """What compiled programs rely on."""
    scan = scan_arguments(case)
    x = scan[0]
    conv = (x, torch.randn(6, 4), torch.randn(6), None, scan[9], "silu", False)
    d_out = LAYOUTS[layout](torch.randn(x.shape))
    with torch.no_grad():
        saved = OPS.selective_scan(*scan, True, True, None)[2]
        calls = [
            (OPS.selective_scan, (*scan, True, True, None)),
            (OPS.selective_scan_backward, (d_out, None, saved, *scan, None)),
            (OPS.causal_conv1d, (*conv, True, True, None)),
            (OPS.causal_conv1d_backward, (d_out, None, torch.empty(0), *conv, None)),
        ]
        for call, arguments in calls:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fakes = call(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
            for real, fake in zip(call(*arguments), fakes, strict=True):
                assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
                assert real.is_contiguous()
                assert fake.is_contiguous()


@pytest.mark.parametrize("backend", [None, "cuda"])
@pytest.mark.parametrize("case", [ScanCase(length=0), ScanCase(batch=0), ScanCase(lengths=(0, 0))])
def test_results_without_elements_are_as_their_fakes(
    case: ScanCase, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is launched, and the states that are saved have the shape that is promised."""
    monkeypatch.setattr(dispatch, "BACKENDS", {**dispatch.BACKENDS, "cuda": lambda case: None})
    backend = backend or "reference"
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")  # none compares values: those are anything
    torch.library.opcheck(OPS.selective_scan, (*scan_arguments(case), True, True, backend), test_utils=tests)
    conv = torch.randn(2, 0, 6, requires_grad=True), torch.randn(6, 4), torch.randn(6), torch.randn(2, 6, 3), None
    torch.library.opcheck(OPS.causal_conv1d, (*conv, "silu", False, True, True, backend), test_utils=tests)
    with FakeTensorMode(allow_non_fake_inputs=True):
        promised = OPS.selective_scan(*scan_arguments(case), True, True, backend)
    for real, fake in zip(OPS.selective_scan(*scan_arguments(case), True, True, backend), promised, strict=True):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    """From here on tensors seem to be on a GPU whose kernels cannot run for this reason; nothing is warned of yet."""
    monkeypatch.setattr(checks, "device_type", lambda x: "cuda")
    monkeypatch.setattr(nvrtc, "explain", lambda: reason)
    monkeypatch.setattr(operator, "_warn_of_slowness", functools.cache(operator._warn_of_slowness.__wrapped__))
    monkeypatch.delenv("SELECTIVE_SSM_BACKEND", raising=False)


def some_calls(backend: str | None, dtype: torch.dtype = torch.float32) -> None:
    x, weight = torch.randn(2, 9, 6, dtype=dtype), torch.randn(6, 4, dtype=dtype)
    for _ in range(2):
        causal_conv1d(x, weight, backend=backend)
        causal_conv1d_step(torch.zeros(2, 6, 3, dtype=dtype), x[:, 0], weight, backend=backend)


def test_a_gpu_without_its_kernels_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    on_a_gpu(monkeypatch, nvrtc._absent.__wrapped__())
    with pytest.warns(UserWarning, match="plain torch runs on the GPU") as caught:
        some_calls(None)
    (warning,) = caught
    assert str(warning.message).endswith("is not installed: pip install 'selective-ssm[cuda]'")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("chosen", ["argument", "environment", "dtype", "device"])
def test_plain_torch_that_was_chosen_is_no_surprise(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, None if chosen == "dtype" else "there is no cuda-core")
    if chosen == "environment":
        monkeypatch.setenv("SELECTIVE_SSM_BACKEND", "reference")
    if chosen == "device":
        monkeypatch.setattr(checks, "device_type", lambda x: "cpu")
    dtype = torch.float64 if chosen == "dtype" else torch.float32
    some_calls("reference" if chosen == "argument" else None, dtype)


def test_meta_tensors_give_shapes() -> None:
    x, maps = torch.empty(2, 9, 6, device="meta"), torch.empty(2, 9, 4, device="meta")
    assert selective_scan(x, x, torch.empty(6, 4, device="meta"), maps, maps).shape == x.shape
    assert causal_conv1d(x, torch.empty(6, 4, device="meta")).device.type == "meta"


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # by which torch loads its forward mode
def test_forward_mode_is_refused_in_words() -> None:
    """Below autograd tangents are lost, and what has none is a derivative of zero."""
    tensors, options = ScanCase().arguments()
    plain = {name: x.detach() for name, x in tensors.items()}
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no derivative in forward mode"):
        selective_scan(**plain | {"u": forward_ad.make_dual(plain["u"], torch.ones_like(plain["u"]))}, **options)


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
    "A has shape (D, 0); expected at least one state": {"A": torch.zeros(6, 0)},
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


def test_a_step_is_checked_again_when_anything_is_laid_out_anew() -> None:
    state, now, A, maps = torch.zeros(2, 6, 4), torch.zeros(2, 6), -torch.ones(6, 4), torch.zeros(2, 4)
    selective_scan_step(state, now, now, A, maps, maps)
    refused = {
        "state has shape (3, 6, 4)": (torch.zeros(3, 6, 4), now, A, maps),
        "delta has dtype int64": (state, now.long(), A, maps),
        "delta has stride 2": (state, torch.zeros(6, 2).T, A, maps),
        "A is on meta": (state, now, A.to("meta"), maps),
        "B has 3 rows; expected B = 2 of them, or D = 6 for all time": (state, now, A, torch.zeros(3, 4)),
        "state_indices has shape (2, 1); expected (B) with B = 2": (state, now, A, maps, torch.zeros(2, 1).int()),
    }
    for sentence, (state, delta, A, B, *indices) in refused.items():
        with pytest.raises((ValueError, TypeError)) as error:
            selective_scan_step(state, now, delta, A, B, maps, state_indices=indices[0] if indices else None)
        assert str(error.value).startswith(sentence)


def test_a_step_of_no_rows() -> None:
    now, maps = torch.zeros(0, 6), torch.zeros(0, 4)
    assert selective_scan_step(torch.zeros(0, 6, 4), now, now, -torch.ones(6, 4), maps, maps).shape == (0, 6)


def test_slots_that_slip_through_never_leave_the_state() -> None:
    state, now, maps = torch.zeros(2, 6, 4), torch.ones(1, 6), torch.ones(1, 1, 4)
    tensors, options = (now, now, -torch.ones(6, 4), maps, maps, None, None, None), (True, False, "euler")
    assert OPS.selective_scan_step(state, *tensors, *options, torch.tensor([99]), None).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_values_on_a_gpu_are_read_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bad = torch.zeros(1, 9, 6).cuda(), torch.zeros(6, 4).cuda(), torch.tensor([0, 5]).cuda()
    assert causal_conv1d(x, weight, cu_seqlens=bad).shape == x.shape
    monkeypatch.setenv("SELECTIVE_SSM_CHECK", "1")
    with pytest.raises(ValueError, match="expected non-decreasing values from 0 to L = 9"):
        causal_conv1d(x, weight, cu_seqlens=bad)
