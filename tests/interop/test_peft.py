"""Adapters learn, act alike merged and unmerged wherever a model is used, and come and go in PEFT's own format."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

from selective_ssm.errors import FileProblem, MissingPackage, UserError
from selective_ssm.files import read_json, read_tensors, write_json, write_tensors
from selective_ssm.generation import Engine, generate
from selective_ssm.interop.peft import TARGETS, TRANSFORMERS_TARGETS, add_lora, load_adapters, merged, save_adapters
from selective_ssm.layers import MambaConfig as OurMambaConfig
from selective_ssm.layers import MLPConfig, S4DConfig
from selective_ssm.models import LanguageModel, LanguageModelConfig
from selective_ssm.ops.constants import Constants
from selective_ssm.tasks import next_token_loss

peft = pytest.importorskip("peft", reason="needs the package peft")

# PEFT's own model asks transformers' one for what has another name now.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

V = 97
IDS = torch.arange(24).reshape(2, 12) * 7 % V


def ours(*pattern: object, **others: object) -> LanguageModel:
    torch.manual_seed(0)
    kinds = {"pattern": pattern} if pattern else {}
    model = LanguageModel(LanguageModelConfig(d_model=16, n_layer=2, vocab_size=V, **kinds, **others))
    nn.init.normal_(model.embedding.weight)  # as wide apart as in a model that has learned
    return model


def theirs(config: type = MambaConfig, model: type = MambaForCausalLM) -> nn.Module:
    torch.manual_seed(0)
    return model(config(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4, expand=2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ours": ours,
    "ours, a hybrid": lambda: ours(OurMambaConfig(), MLPConfig(), tie_embeddings=False),
    "ours, S4D": lambda: ours(OurMambaConfig(ssm=S4DConfig())),
    "transformers' Mamba": theirs,
    "transformers' FalconMamba": lambda: theirs(FalconMambaConfig, FalconMambaForCausalLM),
}


@torch.no_grad()
def learned(model: nn.Module, std: float = 0.3) -> nn.Module:
    """The model with adapters that change what it says."""
    add_lora(model, r=4)
    for parameter in trained(model).values():
        nn.init.normal_(parameter, std=std)
    return model


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest value: some hundred roundings of fp32, or none to speak of."""
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer))


@pytest.mark.parametrize("kind", MODELS)
def test_every_adapter_gets_a_gradient_and_nothing_else(kind: str) -> None:
    model = learned(MODELS[kind]())
    next_token_loss(model(IDS).logits, IDS.roll(-1, 1)).backward()
    linear = {name for name, _ in MODELS[kind]().named_modules() if name.endswith(TARGETS)}
    if "transformers" in kind:
        linear = {name for name in linear if name.endswith(TRANSFORMERS_TARGETS)}
    expected = {f"{name}.lora_{matrix}.default.weight" for name in linear for matrix in "AB"}
    assert set(trained(model)) == expected
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in expected), name


def test_on_transformers_mamba_an_adapter_on_dt_proj_gets_no_gradient() -> None:
    """Why it is refused: were this to fail, it need not be any more."""
    model = theirs()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj", "dt_proj"], init_lora_weights=False))
    model(IDS, labels=IDS).loss.backward()
    got = {name.split(".")[4] for name, parameter in trained(model).items() if parameter.grad is not None}
    assert got == {"in_proj"}


@pytest.mark.parametrize("kind", ["ours", "transformers' Mamba"])
def test_a_run_of_twenty_steps_learns_in_the_adapters_alone(kind: str) -> None:
    model = MODELS[kind]()
    before = copy.deepcopy(model.state_dict())
    add_lora(model, r=4)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=5e-2, weight_decay=0)
    losses = []
    for _ in range(20):
        loss = next_token_loss(model(IDS).logits, IDS.roll(-1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = {name.replace(".base_layer", ""): one for name, one in model.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", MODELS)
def test_merged_logits_are_the_unmerged_ones(kind: str) -> None:
    plain, model = MODELS[kind]().double(), learned(MODELS[kind]().double())
    names = set(model.state_dict())
    whole = merged(model)
    assert type(whole) is type(model)
    assert set(whole.state_dict()) == set(plain.state_dict())
    assert all(parameter.requires_grad for parameter in whole.parameters())
    assert set(model.state_dict()) == names, "the model itself stays as it was"
    logits, before = model(IDS).logits, plain(IDS).logits
    exact = "transformers" not in kind  # whose scan is fp32 in any case
    assert_close(whole(IDS).logits, logits, 1e-9 if exact else 1e-5)
    assert (logits - before).abs().max() > 0.01 * before.abs().max()


def test_a_merged_model_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = learned(ours())
    with pytest.raises(UserError, match=r"parts of another package \(peft\..*merge adapters into its weights"):
        model.save_pretrained(tmp_path)
    merged(model).save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path)
    assert_close(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_with_adapters_is_what_is_written_merged(dtype: torch.dtype) -> None:
    model = learned(ours().to(dtype))
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    prompts, wishes = [[1, 2, 3], [4], [5] * 30], {"max_new_tokens": 16, "temperature": 0, "logprobs": True}
    answers = [generate(one, prompts, **wishes) for one in (model, merged(model))]
    if dtype == torch.float32:
        assert [answer.ids for answer in answers[0]] == [answer.ids for answer in answers[1]]
    first = [[answer.logprobs[0] for answer in some] for some in answers]
    assert first[0] == pytest.approx(first[1], abs=1e-4 if dtype == torch.float32 else 0.1)


def steps(model: LanguageModel, count: int = 5) -> Tensor:
    """Logits of some tokens one by one, of which those after the second may come from a recording."""
    state = model.init_state(2)
    return torch.stack([model.step(IDS[:, time], state).logits for time in range(count)], dim=1)


def test_steps_notice_adapters_that_are_switched_off_on_and_merged_on_the_way() -> None:
    model, plain = learned(ours()), ours()
    state = model.init_state(2)
    time = iter(range(12))

    def step(expected: LanguageModel) -> None:
        before = state.clone()
        for _ in range(3):
            ids = IDS[:, next(time)]
            logits = expected.step(ids, before).logits
            assert_close(model.step(ids, state).logits, logits)

    whole = merged(model)
    for layer in adapted(model):
        layer.enable_adapters(False)
    step(plain)
    for layer in adapted(model):
        layer.enable_adapters(True)
    step(whole)
    for layer in adapted(model):
        layer.merge()
    step(whole)
    for layer in adapted(model):
        layer.enable_adapters(False)
    step(plain)
    assert_close(steps(whole), whole(IDS[:, :5]).logits)


def test_an_engine_forgets_what_other_adapters_have_read() -> None:
    model = learned(ours())
    engine = Engine(model, slots=2, prefix_bytes=10**6)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]

    def written() -> list[int]:
        return engine.submit(prompt, max_new_tokens=12, temperature=0).result().ids

    with_adapters = written()
    for layer in adapted(model):
        layer.enable_adapters(False)
    without = written()
    for layer in adapted(model):
        layer.enable_adapters(True)
        layer.set_scale("default", 0.5)
    weaker = written()
    assert len({tuple(ids) for ids in (with_adapters, without, weaker)}) == 3
    assert without == generate(ours(), prompt, max_new_tokens=12, temperature=0)[0].ids
    assert weaker == generate(merged(model), prompt, max_new_tokens=12, temperature=0)[0].ids


def test_what_a_graph_computes_of_parameters_alone_stays_right_beside_adapters() -> None:
    model = learned(ours().to(torch.bfloat16))
    before, ids = model.read(IDS), torch.tensor([1, 2])

    def function() -> Tensor:
        return model.backbone.step(model.embedding(ids), before.clone().layers)

    with torch.no_grad():
        expected, constants = function(), Constants(model.parameters())
        for way in (constants.learn, constants.serve, constants.serve):
            assert torch.equal(way(function), expected)


@pytest.mark.parametrize("what", ["selective", "full"])
def test_what_runs_again_for_the_backward_pass_drops_the_same(what: str) -> None:
    model = ours()
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(TARGETS), lora_dropout=0.5))
    gradients = []
    for kept in ("none", what):
        torch.manual_seed(1)
        model.backbone.recompute = kept
        parameters = list(trained(model).values())
        gradients.append(torch.autograd.grad(model(IDS).logits.square().mean(), parameters))
    assert all(map(torch.equal, *gradients))
    assert any(bool(one.any()) for one in gradients[0])


@pytest.mark.parametrize("kind", ["ours", "transformers' Mamba"])
def test_pefts_own_format_both_ways(kind: str, tmp_path: Path) -> None:
    model, again, handed = learned(MODELS[kind]()), MODELS[kind](), MODELS[kind]()
    save_adapters(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapters(again, tmp_path / "theirs")
    with torch.no_grad():
        logits = [one.eval()(IDS).logits for one in (model, theirs, again)]
    for other in logits[1:]:
        assert_close(other, logits[0])
    written = [read_tensors(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert written[0].keys() == written[1].keys()
    assert all(map(torch.equal, written[0].values(), written[1].values()))
    assert trained(again) == {}
    load_adapters(handed, tmp_path / "ours", trainable=True)
    assert set(trained(handed)) == set(trained(model))


@pytest.mark.parametrize("by", ["add_lora", "transformers"])
def test_transformers_saves_adapters_while_there_are_some_and_weights_once_merged(by: str, tmp_path: Path) -> None:
    model, again = theirs(), theirs()
    if by == "add_lora":
        add_lora(model, r=4)
    else:
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["in_proj"]))
    for parameter in trained(model).values():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapters")
    load_adapters(again, tmp_path / "adapters")
    merged(model).save_pretrained(tmp_path / "whole")
    whole, logits = MambaForCausalLM.from_pretrained(tmp_path / "whole"), model(IDS).logits
    for one in (again, whole):
        assert_close(one(IDS).logits, logits)


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("ours", {"targets": ["in_prj"]}, r"targets must be one of 'in_proj', 'x_proj', .*did you mean 'in_proj'"),
        ("ours", {"targets": ["conv1d"]}, "targets must be one of"),
        ("ours, S4D", {"targets": ["x_proj"]}, "targets must be one of 'in_proj', 'out_proj'"),
        ("ours", {"targets": ["layers.9.mixer.in_proj"]}, "PEFT puts no such adapters into the model: Target modules"),
        ("ours", {"targets": []}, "targets must be names of linear layers"),
        ("ours", {"targets": "in_proj"}, "targets must be names of linear layers"),
        ("ours", {"alpha": float("nan")}, "alpha of adapters must be above 0"),
        ("ours", {"r": 0}, "rank r of adapters must be 1 or more, got 0"),
        ("transformers' Mamba", {"targets": ["in_proj", "dt_proj"]}, "'dt_proj' .* would get no gradient"),
        ("transformers' Mamba", {"targets": ["out_proj"]}, "'out_proj' .* PEFT takes none there"),
        ("transformers' FalconMamba", {"targets": ["conv1d"]}, "'conv1d' .* PEFT takes none there"),
    ],
)
def test_what_would_come_to_nothing_is_refused_in_words(kind: str, options: dict[str, object], sentence: str) -> None:
    model = MODELS[kind]()
    with pytest.raises(UserError, match=sentence):
        add_lora(model, **options)
    assert len(trained(model)) == len(list(model.parameters())), "nothing was changed"


def test_adapters_are_put_in_once_and_into_models_that_are_known() -> None:
    model = ours()
    for action in (merged, lambda plain: save_adapters(plain, "nowhere")):
        with pytest.raises(UserError, match="the model has no adapters to"):
            action(model)
    add_lora(model)
    with pytest.raises(UserError, match="has adapters already"):
        add_lora(model)
    with pytest.raises(UserError, match=r"get_base_model\(\)"):
        merged(peft.PeftModel(ours(), peft.LoraConfig(target_modules=["in_proj"])))
    with pytest.raises(UserError, match="not into Sequential"):
        add_lora(nn.Sequential(nn.Linear(2, 2)))


def test_adapters_that_do_not_fit_leave_the_model_as_it_is(tmp_path: Path) -> None:
    save_adapters(learned(ours()), tmp_path / "good")
    tensors = read_tensors(tmp_path / "good" / "adapter_model.safetensors")
    name = min(tensors)
    damages = {
        "is missing": {key: one for key, one in tensors.items() if key != name},
        "is not part of the model": {**tensors, "more": torch.ones(1)},
        "expected": {**tensors, name: torch.ones(1, 1)},
        "NaN": {**tensors, name: tensors[name] * torch.nan},
    }
    model = ours()
    logits = model(IDS).logits
    for sentence, damaged in damages.items():
        write_tensors(tmp_path / "good" / "adapter_model.safetensors", damaged)
        with pytest.raises(UserError, match=f"damaged, or of another model: .*{sentence}"):
            load_adapters(model, tmp_path / "good")
        assert torch.equal(model(IDS).logits, logits)
    with pytest.raises(FileProblem, match="there is no such file"):
        load_adapters(model, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"peft_type": "IA3"}, "is not the config of LoRA adapters"),
        ({"modules_to_save": ["head"]}, r"more than LoRA adapters \(modules_to_save\)"),
        ({"alora_invocation_tokens": [1, 2]}, r"more than LoRA adapters \(alora_invocation_tokens\)"),
        ({"init_lora_weights": "pissa"}, r"may change the model's own weights \('pissa'\)"),
        ({"r": "8"}, "PEFT puts no such adapters into the model"),
        ({"layers_to_transform": [99]}, "PEFT puts no such adapters into the model: Target modules"),
        ({"rank_pattern": {"layers.1.mixer.out_proj": -1}}, "PEFT puts no such adapters into the model: `r` should"),
    ],
)
def test_configs_that_are_not_understood_leave_the_model_as_it_is(
    changed: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    save_adapters(learned(ours()), tmp_path)
    write_json(tmp_path / "adapter_config.json", {**read_json(tmp_path / "adapter_config.json"), **changed})
    model, before = ours(), ours().state_dict()
    with pytest.raises(UserError, match=sentence):
        load_adapters(model, tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    add_lora(model)


def test_without_the_package_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackage, match=r"pip install 'selective-ssm\[peft\]'"):
        add_lora(ours())
