"""Runs that start from a checkpoint: all weights train on, or adapters alone, and either goes on bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from selective_ssm.data import ByteTokenizer
from selective_ssm.errors import UserError
from selective_ssm.files import read_tensors
from selective_ssm.interop import peft
from selective_ssm.models import LanguageModel
from selective_ssm.training import LoraConfig, ScheduleConfig, TrainConfig
from selective_ssm.training.run import train
from tests.training.conftest import TINY, MakeConfig, figures

pytest.importorskip("peft", reason="needs the package peft")

STEADY = ScheduleConfig(shape="constant", warmup_steps=3)
LORA = LoraConfig(r=2)
SELDOM = {"save_every": 100, "eval_every": 100}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint to start from, with its tokenizer."""
    torch.manual_seed(3)
    LanguageModel(TINY).save_pretrained(tmp_path / "base")
    ByteTokenizer().save(tmp_path / "base")
    return tmp_path / "base"


def started_from(base: Path, config: TrainConfig, lora: LoraConfig = LORA) -> TrainConfig:
    return dataclasses.replace(config, model=None, base=str(base), lora=lora)


def tensors(config: TrainConfig, place: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return read_tensors(Path(config.trainer.output) / "last" / place)


def assert_same_weights(one: TrainConfig, other: TrainConfig) -> None:
    for place in ["model.safetensors"] + ["adapter/adapter_model.safetensors"] * bool(one.lora.r):
        first, second = tensors(one, place), tensors(other, place)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_adapters_alone_are_trained_and_the_checkpoint_has_them_in_its_weights(
    make_config: MakeConfig, base: Path
) -> None:
    config = started_from(
        base, make_config(max_steps=20, **SELDOM), dataclasses.replace(LORA, targets=("in_proj", "x_proj"))
    )
    summary = train(config, adapters=peft)
    rows = figures(config)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    before, after = read_tensors(base / "model.safetensors"), tensors(config)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith(("in_proj.weight", "x_proj.weight"))
    }
    beside = LanguageModel.from_pretrained(base)
    peft.load_adapters(beside, summary.checkpoint / "adapter")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(
        beside(ids).logits, LanguageModel.from_pretrained(summary.checkpoint)(ids).logits, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("lora", [LoraConfig(), LORA], ids=["all weights", "adapters"])
@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.9, "accumulate": 2}], ids=["plain", "averaged"])
def test_a_run_goes_on_bit_for_bit(
    make_config: MakeConfig, base: Path, lora: LoraConfig, settings: dict[str, float]
) -> None:
    unbroken, broken = (
        started_from(base, make_config(name, schedule=STEADY, **SELDOM, **settings), lora)
        for name in ("unbroken", "broken")
    )
    shorter = dataclasses.replace(broken, trainer=dataclasses.replace(broken.trainer, max_steps=5))
    train(shorter, adapters=peft)
    assert train(broken, adapters=peft).resumed_at == 5
    train(unbroken, adapters=peft)
    ends = [[row for row in figures(one) if row["step"] != "5"] for one in (broken, unbroken)]
    assert ends[0] == ends[1], "the shorter run evaluated at its end, too"
    assert_same_weights(broken, unbroken)


def test_the_first_step_starts_where_the_base_stopped(make_config: MakeConfig, base: Path) -> None:
    whole, adapters = (started_from(base, make_config(f"{lora.r}", max_steps=1), lora) for lora in (LoraConfig(), LORA))
    for config in (whole, adapters):
        train(config, adapters=peft)
    assert figures(whole)[0]["loss"] == figures(adapters)[0]["loss"]
    new = make_config("new", max_steps=1)
    train(new)
    assert figures(new)[0]["loss"] != figures(whole)[0]["loss"]


def test_another_base_is_noticed(make_config: MakeConfig, base: Path) -> None:
    train(started_from(base, make_config(max_steps=1)), adapters=peft)
    LanguageModel(TINY).save_pretrained(base)
    with pytest.raises(UserError, match="the base .* is not what it was"):
        train(started_from(base, make_config(max_steps=2)), adapters=peft)


@pytest.mark.parametrize(
    ("lora", "named"),
    [(LoraConfig(r=3), r"lora\.r was 2, now 3"), (LoraConfig(r=2, alpha=4.0), r"lora\.alpha was 16\.0, now 4\.0")],
)
def test_a_run_keeps_its_adapters(make_config: MakeConfig, base: Path, lora: LoraConfig, named: str) -> None:
    train(started_from(base, make_config(max_steps=1)), adapters=peft)
    with pytest.raises(UserError, match=named):
        train(started_from(base, make_config(max_steps=2), lora), adapters=peft)


def test_settings_that_say_too_little_or_too_much_are_refused(make_config: MakeConfig, base: Path) -> None:
    config = make_config()
    with pytest.raises(UserError, match="either model, .* or base"):
        dataclasses.replace(config, base=str(base))
    with pytest.raises(UserError, match="either model, .* or base"):
        dataclasses.replace(config, model=None)
    with pytest.raises(UserError, match="name their checkpoint as base"):
        dataclasses.replace(config, lora=LORA)
    with pytest.raises(UserError, match="give their rank r too"):
        LoraConfig(alpha=8.0)
    with pytest.raises(UserError, match="r must be 1 or more, or 0"):
        LoraConfig(r=-1)
    with pytest.raises(UserError, match=r"adapters=selective_ssm\.interop\.peft"):
        train(started_from(base, config))
    with pytest.raises(UserError, match="did you mean 'in_proj'"):
        train(started_from(base, config, LoraConfig(r=2, targets=("in_pro",))), adapters=peft)


def test_another_tokenizer_than_the_bases_is_refused(make_config: MakeConfig, base: Path) -> None:
    tokenizer = base.parent / "tokenizer.json"
    tokenizer.write_text(WORDS)
    config = make_config(data={"tokenizer": str(tokenizer)})
    with pytest.raises(UserError, match="is not the base's own: name that one, --data.tokenizer .*base"):
        train(started_from(base, config), adapters=peft)


WORDS = """{"model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 0, "times": 1}, "unk_token": "<|endoftext|>"}}"""
