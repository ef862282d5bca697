"""Which parameters decay, and at what rate each learns."""

from __future__ import annotations

import pytest
import torch

from selective_ssm.errors import UserError
from selective_ssm.layers import MambaConfig, MLPConfig
from selective_ssm.layers.s6 import S6
from selective_ssm.models import LanguageModel, LanguageModelConfig
from selective_ssm.training.optimizer import OptimizerConfig, adamw, parameter_groups

MODEL = LanguageModelConfig(d_model=16, n_layer=2, vocab_size=11, pattern=(MambaConfig(bias=True), MLPConfig()))
NAN, INFINITE = float("nan"), float("inf")


def names_by(model: LanguageModel, config: OptimizerConfig, key: str) -> dict[float, set[str]]:
    """The names of the parameters by a setting of the group they are in; each is in one group, once."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, names))
    found: dict[float, set[str]] = {}
    for group in groups:
        found.setdefault(group[key], set()).update(names[parameter] for parameter in group["params"])
    return found


def test_only_matrices_decay_and_not_those_of_the_recurrence() -> None:
    model = LanguageModel(MODEL)
    by_decay = names_by(model, OptimizerConfig(weight_decay=0.1), "weight_decay")
    assert set(by_decay) == {0.0, 0.1}
    decayed = {name.rpartition("layers.")[2] for name in by_decay[0.1]}
    ends = {name.rpartition(".")[2] for name in by_decay[0.0]}
    assert {"A_log", "D", "bias"} <= ends
    assert not any(name.endswith(("A_log", ".D", "bias")) or "norm" in name for name in decayed)
    assert all(any(name.endswith(part) for name in decayed) for part in ("in_proj.weight", "x_proj.weight"))
    assert "embedding.weight" in by_decay[0.1]


def test_a_class_can_declare_rates_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S6, "learning_rates", {"A_log": 0.25})
    by_rate = names_by(LanguageModel(MODEL), OptimizerConfig(lr=2e-3), "peak_lr")
    assert set(by_rate) == {2e-3, 5e-4}
    assert {name.rpartition(".")[2] for name in by_rate[5e-4]} == {"A_log"}


@pytest.mark.parametrize("fused", [False, True])
def test_steps_are_those_of_decoupled_weight_decay(fused: bool) -> None:
    """AdamW's first step moves each weight by lr · sign(gradient), after shrinking the decayed ones."""
    model = LanguageModel(MODEL)
    optimizer = adamw(model, OptimizerConfig(lr=1e-2, weight_decay=0.5, eps=1e-30), fused=fused)
    weight, bias = model.embedding.weight, next(p for n, p in model.named_parameters() if n.endswith("A_log"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = weight.detach().clone(), bias.detach().clone()
    optimizer.step()
    torch.testing.assert_close(weight, before[0] * (1 - 1e-2 * 0.5) - 1e-2)
    torch.testing.assert_close(bias, before[1] - 1e-2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lr", value) for value in (0.0, NAN, INFINITE)),
        ("betas", (0.9, 1.0)),
        *(("eps", value) for value in (-1.0, NAN, INFINITE)),
        *(("weight_decay", value) for value in (-1.0, NAN, INFINITE)),
        *(("clip", value) for value in (-1.0, NAN)),
    ],
)
def test_impossible_settings_are_refused(name: str, value: object) -> None:
    with pytest.raises(UserError, match=name):
        OptimizerConfig(**{name: value})
