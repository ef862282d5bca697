"""Steps from a recording: the same bits as steps without, whatever changes in between."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selective_ssm.layers import MambaConfig, MLPConfig, S6Config
from selective_ssm.models import LanguageModel, LanguageModelConfig, ModelState
from selective_ssm.ops import native

needs_library = pytest.mark.skipif(native.explain() is not None, reason=str(native.explain()))
CONFIG = LanguageModelConfig(d_model=32, n_layer=3, vocab_size=97)
HYBRID = LanguageModelConfig(d_model=32, n_layer=2, vocab_size=97, pattern=(MambaConfig(), MLPConfig()))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def build(config: LanguageModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(config).to(dtype)


@torch.no_grad()
def plain_step(model: LanguageModel, ids: Tensor, state: ModelState, state_indices: Tensor | None = None) -> Tensor:
    x = model.backbone.step(model.embedding(ids), state.layers, state_indices=state_indices)
    return model.logits(x)


def recordings(model: LanguageModel, state: ModelState) -> int:
    steps = model._decoder._steps.get(state, {})
    return sum(step is not None and step._recording is not None for step in steps.values())


class Pair:
    """A state that steps from recordings, and its twin that does not."""

    def __init__(self, model: LanguageModel, slots: int = 2) -> None:
        self.model, self.state, self.twin = model, model.init_state(slots), model.init_state(slots)
        self.time = 0

    def step(self, times: int = 3, **options: Any) -> None:
        rows = len(options["state_indices"]) if options else self.state.slots
        for _ in range(times):
            self.time += 1
            ids = torch.arange(rows) * 7 % 97 + self.time % 50
            logits = self.model.step(ids, self.state, **options).logits
            assert logits.equal(plain_step(self.model, ids, self.twin, **options))
        for one, other in zip(self.state.layers, self.twin.layers, strict=True):
            assert all(x.equal(y) for x, y in zip(one, other, strict=True))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual_in_fp32", [True, False])
@pytest.mark.parametrize("slots", [1, 8])
def test_a_recorded_step_gives_the_same_bits(dtype: torch.dtype, residual_in_fp32: bool, slots: int) -> None:
    config = LanguageModelConfig(d_model=32, n_layer=3, vocab_size=97, residual_in_fp32=residual_in_fp32)
    pair = Pair(build(config, dtype), slots)
    pair.step(6)
    assert recordings(pair.model, pair.state) == 1
    assert pair.state.position.tolist() == [6] * slots


@needs_library
def test_norms_of_b_c_and_delta_are_recorded_for_one_text() -> None:
    config = LanguageModelConfig(
        d_model=32, n_layer=2, vocab_size=97, pattern=(MambaConfig(ssm=S6Config(norm_eps=1e-6)),)
    )
    pair = Pair(build(config), slots=1)
    pair.step(4)
    assert recordings(pair.model, pair.state) == 1


@needs_library
def test_slots_may_change_from_step_to_step() -> None:
    pair = Pair(build(), slots=5)
    for indices in ([0, 3, 4], [4, -1, 1], [2, 0, -1], [1, 4, 3]):
        pair.step(1, state_indices=torch.tensor(indices, dtype=torch.int32))
    pair.step(2)
    pair.step(3, state_indices=torch.tensor([2]))
    assert recordings(pair.model, pair.state) == 3


@needs_library
def test_what_was_answered_stays_as_it_is() -> None:
    model = build()
    state = model.init_state(1)
    answers = [model.step(torch.tensor([token]), state).logits for token in range(5)]
    kept = [answer.clone() for answer in answers]
    model.step(torch.tensor([9]), state)
    assert all(answer.equal(one) for answer, one in zip(answers, kept, strict=True))


class Doubled(nn.Module):
    """As an adapter stands in a linear layer's place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


class Switch(nn.Module):
    """As an adapter does that can be switched off: for now it hands through."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.is_on = inner, False

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x) if self.is_on else self.inner(x)


def _replace_data(model: LanguageModel) -> None:
    model.backbone.layers[0].mixer.ssm.D.data = torch.randn(64)


def _replace_parameter(model: LanguageModel) -> None:
    model.backbone.layers[1].mixer.out_proj.weight = nn.Parameter(torch.randn(32, 64))


def _wrap(model: LanguageModel) -> None:
    mixer = model.backbone.layers[1].mixer
    mixer.in_proj = Doubled(mixer.in_proj)


def _remove_norm(model: LanguageModel) -> None:
    model.backbone.layers[2].norm = nn.Identity()
    model.backbone.layers[2].norm.add = lambda residual, branch: (residual + branch, residual + branch)


def _optimise(model: LanguageModel) -> None:
    model(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


CHANGES: dict[str, Callable[[LanguageModel], object]] = {
    "an optimiser's step": _optimise,
    "a write in place": lambda model: nn.init.normal_(model.backbone.layers[1].mixer.ssm.A_log),
    "another state dict": lambda model: model.load_state_dict(LanguageModel(CONFIG).state_dict()),
    "other memory": _replace_data,
    "another parameter": _replace_parameter,
    "an adapter": _wrap,
    "another module": _remove_norm,
    "a hook": lambda model: model.backbone.layers[0].mixer.out_proj.register_forward_hook(lambda *x: 3 * x[-1]),
    "the number of threads": lambda model: torch.set_num_threads(2),
    "wider, and back": lambda model: model.double().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: str) -> None:
    pair = Pair(build())
    pair.step(4)
    CHANGES[change](pair.model)
    pair.step(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_write_to_any_parameter_is_noticed(dtype: torch.dtype) -> None:
    pair = Pair(build(dtype=dtype))
    pair.step(3)
    for parameter in pair.model.parameters():
        nn.init.uniform_(parameter)
        pair.step(2)


def test_another_backend_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(build())
    pair.step(4)
    monkeypatch.setenv("SELECTIVE_SSM_BACKEND", "reference")
    pair.step(4)
    assert recordings(pair.model, pair.state) == 0


def test_hooks_of_all_modules_are_called_each_time() -> None:
    model, calls = build(), []
    state = model.init_state(1)
    for _ in range(3):
        model.step(torch.tensor([1]), state)
    with nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module)):
        for _ in range(3):
            model.step(torch.tensor([1]), state)
    assert calls.count(model.backbone.layers[0].mixer.in_proj) == 3


def test_what_cannot_be_recorded_runs_as_ever() -> None:
    pair = Pair(build(HYBRID))
    pair.step(5)
    assert recordings(pair.model, pair.state) == 0
    with torch.autocast("cpu", torch.bfloat16):
        pair.step(3)


def test_what_modules_of_others_may_change_is_not_recorded() -> None:
    model = build()
    mixer = model.backbone.layers[1].mixer
    mixer.in_proj = Switch(mixer.in_proj)
    pair = Pair(model)
    pair.step(4)
    mixer.in_proj.is_on = True
    pair.step(4)
    assert recordings(pair.model, pair.state) == 0


def test_states_are_values() -> None:
    pair = Pair(build())
    pair.step(4)
    for state, twin in ((pair.state.clone(), pair.twin.clone()), (pair.state.select([1]), pair.twin.select([1]))):
        fork = Pair(pair.model)
        fork.state, fork.twin = state, twin
        fork.step(3)
        pair.step(2)


def test_a_state_that_is_gone_leaves_nothing() -> None:
    model = build()
    state = model.init_state(1)
    for _ in range(4):
        model.step(torch.tensor([1]), state)
    assert len(model._decoder._steps) == 1
    del state
    gc.collect()
    assert len(model._decoder._steps) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_records_for_itself(copied: Callable[[LanguageModel], LanguageModel]) -> None:
    pair = Pair(build())
    pair.step(3)
    twin = Pair(copied(pair.model))
    nn.init.zeros_(pair.model.backbone.layers[0].mixer.out_proj.weight)
    twin.step(3)
    pair.step(3)


def test_inference_mode_may_come_and_go() -> None:
    pair = Pair(build())
    for _ in range(3):
        pair.step(3)
        with torch.inference_mode():
            pair.step(3)
    with torch.inference_mode():
        model = build()
        pair = Pair(model)
        pair.step(4)


def test_a_write_to_a_state_that_a_gradient_needs_is_told() -> None:
    model = build()
    state = model.init_state(1)
    for _ in range(4):
        model.step(torch.tensor([1]), state)
    out = (state.layers[0][1] * torch.ones((), requires_grad=True)).sum()
    model.step(torch.tensor([1]), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


FORKED = """
import concurrent.futures
import os
import torch
from tests.models.test_decoding import Pair, build

torch.set_num_threads(2)
pairs = [Pair(build()) for _ in range(4)]
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda pair: pair.step(20), pairs))
child = os.fork()
if child == 0:
    pairs[0].step(20)
    Pair(build()).step(20)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
pairs[1].step(20)
"""


@needs_library
def test_python_threads_and_forked_children_may_step() -> None:
    subprocess.run([sys.executable, "-c", FORKED], cwd=Path(__file__).parents[2], check=True, timeout=60)


@needs_library
@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_number_of_threads_changes_no_bit(count: int) -> None:
    answers = []
    for threads in (1, count):
        torch.set_num_threads(threads)
        model = build()
        state = model.init_state(2)
        answers.append(torch.stack([model.step(torch.tensor([t, 9]), state).logits for t in range(6)]))
    assert answers[0].equal(answers[1])
