"""Reads and steps from CUDA graphs do what they do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from selective_ssm.errors import UserError
from selective_ssm.generation import graphs
from selective_ssm.generation.engine import Engine
from selective_ssm.generation.graphs import Graphs
from selective_ssm.generation.loop import Loop
from selective_ssm.generation.packs import PADDED
from selective_ssm.generation.reads import Reads
from selective_ssm.generation.slots import Slots, sizes_up_to
from selective_ssm.layers import MambaConfig, S6Config
from selective_ssm.models import LanguageModel, LanguageModelConfig
from selective_ssm.ops import nvrtc

needs_gpu = pytest.mark.skipif(nvrtc.explain() is not None, reason=str(nvrtc.explain()))
CONFIG = LanguageModelConfig(d_model=64, n_layer=2, vocab_size=101, pattern=(MambaConfig(ssm=S6Config(d_state=8)),))
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {},
    "cut": {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.3},
    "with log-probabilities": {"logprobs": True},
}


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(CONFIG).to("cuda", torch.bfloat16).eval()


def written(model: LanguageModel, way: dict[str, Any], **options: Any) -> list[tuple[list[int], list[float] | None]]:
    """Prompts of all lengths, more than there are slots, each with its own seed and number of tokens."""
    engine = Engine(model, slots=6, prefill_budget=50, **options)
    prompts = [[(7 * i + j) % 101 for j in range(1 + 11 * i % 40)] for i in range(15)]
    requests = [engine.submit(one, max_new_tokens=9 + i % 5, seed=i, **way) for i, one in enumerate(prompts)]
    results = [request.result() for request in requests]
    return [(one.ids, one.logprobs) for one in results]


@needs_gpu
@pytest.mark.parametrize("way", WAYS)
def test_graphs_change_nothing(model: LanguageModel, way: str) -> None:
    plain = written(model, WAYS[way], graphs=False, run_ahead=False)
    assert written(model, WAYS[way]) == plain
    assert written(model, WAYS[way], run_ahead=False) == plain


@needs_gpu
def test_steps_allocate_nothing_once_there_are_graphs(model: LanguageModel) -> None:
    engine = Engine(model, slots=8)
    engine.warm_up(temperature=0)
    made = engine._loop._graphs
    assert made is not None
    assert len(made) == len(sizes_up_to(8)) + sum(size.tokens <= 2048 for size in PADDED)
    there = len(made)
    requests = [engine.submit([1, 2, 3], max_new_tokens=100, temperature=0) for _ in range(8)]

    def allocated() -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    with torch.inference_mode():
        for _ in range(5):
            engine.step()
        before = allocated()
        for _ in range(50):
            engine.step()
        assert allocated() == before
    assert len(made) == there
    assert len({tuple(request.result().ids) for request in requests}) == 1


@needs_gpu
def test_reads_from_graphs_are_those_without(model: LanguageModel) -> None:
    """Bit for bit, whatever was read by the same graph before."""
    ends: list[dict[str, torch.Tensor]] = []
    for made in (None, Graphs(model)):
        slots = Slots(model, 9, 101)
        reads = Reads(model, slots, made)
        with torch.no_grad():
            for count in (9, 1, 3):
                reads([(slot, [(slot + i) % 101 for i in range(1 + 40 * slot)]) for slot in range(count)])
        ends.append(slots.state.tensors())
    assert ends[0]["position"].tolist()[:3] == [3, 82, 162]
    for name, tensor in ends[0].items():
        assert torch.equal(tensor[:9], ends[1][name][:9]), name


@needs_gpu
def test_graphs_are_made_anew_when_parameters_change(model: LanguageModel) -> None:
    engine = Engine(model, slots=1)
    for _ in range(2):
        wanted = Engine(model, slots=1, graphs=False).submit([5, 6], max_new_tokens=20, temperature=0).result().ids
        assert engine.submit([5, 6], max_new_tokens=20, temperature=0).result().ids == wanted
        with torch.no_grad():
            for layer in model.backbone.layers:
                layer.mixer.ssm.A_log.add_(1)
                layer.mixer.in_proj.weight.mul_(-1)
                layer.mixer.in_proj.weight = torch.nn.Parameter(layer.mixer.in_proj.weight.clone())


@needs_gpu
def test_graphs_made_while_a_text_is_written_leave_it_alone(model: LanguageModel) -> None:
    assert_warming_up_changes_no_text(model)


def test_warming_up_while_a_text_is_written_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a graph is the function itself, which is run when it is made, too."""

    def made(function: Callable[[], Any], *_: Any) -> Callable[[], Any]:
        function()
        return function

    monkeypatch.setattr(graphs, "Graph", made)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    make = Loop.__init__
    monkeypatch.setattr(
        Loop, "__init__", lambda *args, **options: make(args[0], *args[1:3], Graphs(args[1]), **options)
    )
    assert_warming_up_changes_no_text(LanguageModel(CONFIG).double().eval())


def assert_warming_up_changes_no_text(model: LanguageModel) -> None:
    wanted = Engine(model, slots=1).submit([5, 6], max_new_tokens=9).result().ids
    engine = Engine(model, slots=2)
    request = engine.submit([5, 6], max_new_tokens=9)
    for _ in range(3):
        engine.step()
    engine.warm_up(temperature=0)
    engine.warm_up()
    assert request.result().ids == wanted


def test_graphs_on_a_cpu_are_refused() -> None:
    with pytest.raises(UserError, match="graphs are made on a GPU only"):
        Engine(LanguageModel(CONFIG), graphs=True)


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (16, [1, 2, 4, 8, 16])])
def test_numbers_of_rows(count: int, sizes: list[int]) -> None:
    assert sizes_up_to(count) == sizes
