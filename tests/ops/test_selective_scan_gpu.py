"""The scan on a GPU where an emulator would not do: large sizes, streams, graphs, compilation, and a training run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.models.config import LanguageModelConfig
from selective_ssm.models.language import LanguageModel
from selective_ssm.ops import causal_conv1d_step, nvrtc, selective_scan, selective_scan_step
from selective_ssm.ops.selective_scan import operands, plan
from tests.ops import wide_grid
from tests.ops.launches import poison
from tests.tolerance import assert_close_to_float64

pytestmark = pytest.mark.skipif(nvrtc.explain() is not None, reason=str(nvrtc.explain()))

BRAIN = torch.bfloat16
GIGABYTE = 2**30
SUMMED = ("A", "D", "delta_bias")


@pytest.fixture
def long_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets the reference take few and large steps."""
    monkeypatch.setattr(operands, "STEPS", 512)
    monkeypatch.setattr(operands, "BLOCK_ELEMENTS", 2**24)
    return


def leaves(
    batch: int,
    length: int,
    channels: int,
    state: int = 16,
    dtype: torch.dtype = BRAIN,
    seed: int = 0,
    step: float = 1e-3,
) -> dict[str, Tensor]:
    """Arguments as they are when a model starts, on the GPU, each differentiable; the smallest step is about `step`."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    rates = -torch.arange(1.0, state + 1, device="cuda").repeat(channels, 1)
    steps = torch.exp(torch.rand(channels, generator=generator, device="cuda") * math.log(100) + math.log(step))
    tensors = {
        "u": normal(batch, length, channels, dtype=dtype),
        "delta": normal(batch, length, channels, dtype=dtype),
        "A": rates,
        "B": normal(batch, length, state, dtype=dtype),
        "C": normal(batch, length, state, dtype=dtype),
        "D": normal(channels),
        "z": normal(batch, length, channels, dtype=dtype),
        "delta_bias": steps.expm1().log(),
        "initial_state": normal(batch, channels, state),
    }
    return {name: x.requires_grad_() for name, x in tensors.items()}


def scan(tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    outputs = selective_scan(**tensors, delta_softplus=True, return_final_state=True, **options)
    assert isinstance(outputs, tuple)
    return outputs


def everything(
    tensors: dict[str, Tensor], d_out: Tensor, d_final: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """The outputs and every gradient."""
    out, final = scan(tensors, **options)
    ends, weights = ((out,), (d_out,)) if d_final is None else ((out, final), (d_out, d_final))
    return [out.detach(), final.detach(), *torch.autograd.grad(ends, list(tensors.values()), weights)]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


def assert_close(tensors: dict[str, Tensor], d_out: Tensor, ours: list[Tensor], tokens: int, **options: Any) -> None:
    """By the rule, against the reference in fp32 and in float64."""
    plain = everything(tensors, d_out, backend="reference", **options)
    wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    exact = everything(wide, d_out.double(), backend="reference", **options)
    for name, x, reference, truth in zip(["out", "final state", *tensors], ours, plain, exact, strict=True):
        summed = tokens if name in SUMMED else tensors["u"].shape[2] if name in {"B", "C"} else 0
        assert_close_to_float64(x, reference, truth, summed=summed, name=name)


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_backward_is_deterministic(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    tensors = leaves(3, 1000, 520)
    d_out, d_final = torch.randn_like(tensors["u"]), torch.randn_like(tensors["initial_state"])
    with plan.overridden(lanes=2, pieces=pieces):
        runs = [everything(tensors, d_out, d_final, backend="cuda") for _ in range(20)]
    for run in runs[1:]:
        assert_equal(run, runs[0])


def test_more_than_2_to_31_elements() -> None:
    """Channels share nothing but B and C, whose gradients only some channels are let contribute to.

    Steps are large: this is about addresses, and where states are kept for long it would be about rounding.
    """
    batch, length, channels, state = 5, 16_421, 26_240, 2
    assert batch * length * channels > 2**31
    if torch.cuda.mem_get_info()[0] < 70 * GIGABYTE:
        pytest.skip("the GPU has less than 70 GB free")
    tensors = leaves(batch, length, channels, state, step=0.1)
    picked = torch.cat([torch.arange(8), torch.arange(channels - 8, channels)]).cuda()
    d_out = torch.zeros_like(tensors["u"])
    for part in (slice(8), slice(-8, None)):
        d_out[..., part].normal_()
    ours = everything(tensors, d_out, backend="cuda")

    few = {name: pick(x, picked, channels) for name, x in tensors.items()}
    ours = [pick(x, picked, channels) for x in ours]
    del tensors
    assert_close(
        {name: x.requires_grad_() for name, x in few.items()}, pick(d_out, picked, channels), ours, batch * length
    )


def pick(x: Tensor, picked: Tensor, channels: int) -> Tensor:
    """Some of the channels, on whatever axis they are."""
    axis = next((i for i, size in enumerate(x.shape) if size == channels), None)
    return x.detach() if axis is None else x.detach().index_select(axis, picked)


@pytest.mark.usefixtures("long_segments")
@pytest.mark.parametrize("reverse", [False, True])
def test_one_channel_of_a_million_tokens(reverse: bool) -> None:
    tensors = leaves(1, 2**20, 1, dtype=torch.float32)
    d_out = torch.randn_like(tensors["u"])
    ours = everything(tensors, d_out, backend="cuda", reverse=reverse)
    assert_close(tensors, d_out, ours, 2**20, reverse=reverse)


def test_another_stream_than_the_default() -> None:
    """A long pause in one stream would show if work went into another."""
    tensors = leaves(2, 500, 64)
    d_out = torch.randn_like(tensors["u"])
    expected = everything(tensors, d_out, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = {name: (x.detach() * 1).requires_grad_() for name, x in tensors.items()}
        ours = everything(late, d_out, backend="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal(ours, expected)


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_graph_holds_forward_and_backward(pieces: int) -> None:
    tensors, other = leaves(2, 300, 64), leaves(2, 300, 64, seed=1)
    d_out, d_final = torch.randn_like(tensors["u"]), torch.randn_like(tensors["initial_state"])
    with plan.overridden(lanes=4, pieces=pieces):
        expected = everything(other, d_out, d_final, backend="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            everything(tensors, d_out, d_final, backend="cuda")
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = everything(tensors, d_out, d_final, backend="cuda")
    with torch.no_grad():
        for name, x in tensors.items():
            x.copy_(other[name])
    graph.replay()
    assert_equal(captured, expected)


def test_a_graph_holds_steps_that_follow_one_another() -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    x, weight, A, B, C = normal(3, 8).to(BRAIN), normal(8, 4), -normal(8, 16).exp(), normal(3, 16), normal(3, 16)
    slots = torch.tensor([4, -1, 0]).cuda()
    at_start = normal(5, 8, 3), normal(5, 8, 16)

    def tokens(window: Tensor, state: Tensor) -> list[Tensor]:
        outs = []
        for _ in range(3):
            y = causal_conv1d_step(window, x, weight, activation="silu", state_indices=slots, backend="cuda")
            outs.append(
                selective_scan_step(state, y, y, A, B, C, delta_softplus=True, state_indices=slots, backend="cuda")
            )
        return outs

    eager, captured = [[x.clone() for x in at_start] for _ in range(2)]
    expected = tokens(*eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = tokens(*captured)
    graph.replay()
    assert_equal([*outs, *captured], [*expected, *eager])


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_whole_it_gives_the_eager_result(packed: bool) -> None:
    tensors = leaves(1, 100, 64)
    offsets = torch.tensor([0, 30, 30, 100], dtype=torch.int32).cuda() if packed else None
    if packed:
        tensors["initial_state"] = torch.randn(3, 64, 16, device="cuda", requires_grad=True)

    def function(**tensors: Tensor) -> Tensor:
        out, final = scan(tensors | {"u": tensors["u"] * 2}, cu_seqlens=offsets, backend="cuda")
        return out.float().square().sum() + final.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(**tensors), list(tensors.values()))
    for _ in range(2):
        ours = torch.autograd.grad(compiled(**tensors), list(tensors.values()))
        assert_equal(list(ours), list(expected))


def curve(low_precision: bool, nudge: float = 0.0, steps: int = 200) -> list[float]:
    """The losses of a small model that learns some sequences by heart."""
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(d_model=64, n_layer=2, vocab_size=32)).cuda()
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device="cuda")
            parameter.mul_(1 + nudge * noise)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(32, (8, 64), generator=generator, device="cuda")
    losses = []
    for _ in range(steps):
        with torch.autocast("cuda", BRAIN, enabled=low_precision):
            logits, _ = model(ids[:, :-1])
        loss = F.cross_entropy(logits.float()[..., :32].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


@pytest.mark.parametrize("low_precision", [False, True])
def test_a_model_learns_as_with_the_reference(low_precision: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to its curve as another of its own whose weights differ in their last digits."""
    curves = {}
    for name, backend, nudge in (("ours", "cuda", 0.0), ("reference", "reference", 0.0), ("nudged", "reference", 1e-7)):
        monkeypatch.setenv("SELECTIVE_SSM_BACKEND", backend)
        curves[name] = curve(low_precision, nudge)
    plain = curves["reference"]
    assert plain[-1] < 0.1 * plain[0]
    apart, spread = (max(abs(x - y) for x, y in zip(curves[name], plain, strict=True)) for name in ("ours", "nudged"))
    assert apart <= 4 * spread + 5e-4, f"{apart:.1e} apart, though the reference itself spreads by {spread:.1e}"


@pytest.mark.slow
def test_the_wide_grid() -> None:
    grid = wide_grid.Grid(seed=1)
    grid.compile_kernels()
    report = wide_grid.run(grid, count=1000, seconds=60)
    assert not report.failures, str(report)
