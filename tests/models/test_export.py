"""Exported programs answer as the model does, for any batch and length, and leave the state they are given alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from selective_ssm.errors import UserError
from selective_ssm.layers import AttentionConfig, MambaConfig, MixerConfig, MLPConfig, RWKVConfig, S4DConfig
from selective_ssm.models import LanguageModel, LanguageModelConfig
from selective_ssm.models.export import Exported, export

HYBRID = (MambaConfig(ssm_norm=True), MLPConfig(), MambaConfig(ssm=S4DConfig()))
RELEASED = LanguageModelConfig(d_model=16, n_layer=2, vocab_size=97)
OTHERS = {"n_layer": 3, "pattern": HYBRID, "max_positions": 99, "tie_embeddings": False}
MODELS = {
    "as released": (RELEASED, torch.float32),
    "a hybrid in bf16": (dataclasses.replace(RELEASED, **OTHERS), torch.bfloat16),
}
Place = tuple[LanguageModel, Exported]


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest) -> Place:
    config, dtype = MODELS[request.param]
    model = LanguageModel(config).to(dtype).eval()
    return model, export(model)


def assert_alike(model: LanguageModel, programs: Exported, batch: int, length: int) -> None:
    """A text read in two chunks and a step."""
    chunks = torch.randint(97, (batch, 2, length))
    state, tensors = model.init_state(batch), model.init_state(batch).tensors()
    for ids in (chunks[:, 0], chunks[:, 1], chunks[:, 0, 0]):
        given = {name: tensor.clone() for name, tensor in tensors.items()}
        with torch.no_grad():
            expected = model.prefill(ids, state) if ids.ndim == 2 else model.step(ids, state)
        program = programs.prefill if ids.ndim == 2 else programs.step
        logits, after = program.module()(ids, tensors)
        assert all(torch.equal(tensors[name], given[name]) for name in given), "the state given stays as it was"
        assert not logits.requires_grad
        torch.testing.assert_close((logits, after), (expected.logits, expected.state.tensors()))
        state, tensors = expected.state, after


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 2), (3, 40)])
def test_programs_answer_as_the_model_does(exported: Place, batch: int, length: int) -> None:
    assert_alike(*exported, batch, length)


def test_programs_survive_being_saved(exported: Place, tmp_path: Path) -> None:
    model, programs = exported
    for name, program in programs._asdict().items():
        torch.export.save(program, tmp_path / f"{name}.pt2")
    assert_alike(model, Exported(*(torch.export.load(tmp_path / f"{name}.pt2") for name in Exported._fields)), 2, 5)


def test_the_operators_stay_whole(exported: Place) -> None:
    _, programs = exported
    for program, name in ((programs.prefill, "selective_scan"), (programs.step, "selective_scan_step")):
        shown = " ".join(str(module.code) for module in program.graph_module.modules() if hasattr(module, "code"))
        assert f"torch.ops.selective_ssm.{name}.default" in shown


@pytest.mark.parametrize(
    ("mixer", "sentence"),
    [(AttentionConfig(), "grows with the text"), (RWKVConfig(), "mixers of rwkv make no program for any batch")],
)
def test_what_reads_by_the_length_is_refused_in_words(mixer: MixerConfig, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        export(LanguageModel(dataclasses.replace(RELEASED, n_layer=1, pattern=(mixer,))))
