"""Runs from their config to their checkpoints."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from selective_ssm.config import to_tagged
from selective_ssm.data import held_out_documents, load_tokenizer
from selective_ssm.errors import FileProblem, UserError
from selective_ssm.evaluation import evaluate
from selective_ssm.files import read_json, write_json
from selective_ssm.models import LanguageModel
from selective_ssm.training import OptimizerConfig, ScheduleConfig, TrainConfig, module
from selective_ssm.training.run import train
from tests.training.conftest import TINY, MakeConfig, figures

STEADY = ScheduleConfig(shape="constant", warmup_steps=0)


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in LanguageModel.from_pretrained(folder).parameters()]).detach()


def test_a_run_learns_and_leaves_a_model_that_anyone_can_use(make_config: MakeConfig) -> None:
    config = make_config(max_steps=60, optimizer=OptimizerConfig(lr=2e-2))
    summary = train(config)
    rows = figures(config)
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"])
    assert (summary.steps, summary.tokens, summary.resumed_at) == (60, 60 * 2 * 16, 0)
    assert summary.loss == float(rows[-1]["loss"])
    tokenizer = load_tokenizer(summary.checkpoint)
    assert tokenizer is not None
    measured = evaluate(LanguageModel.from_pretrained(summary.checkpoint), held_out_documents(config.data), tokenizer)
    assert summary.held_out_bits_per_byte == pytest.approx(measured.bits_per_byte, rel=1e-6)
    assert read_json(summary.checkpoint / "train.json") == to_tagged(config)
    card = (summary.checkpoint / "README.md").read_text()
    assert f"## Data\n\n`{config.data.source}`\n" in card
    assert "| steps | 60 |" in card
    assert f"as last measured | {measured.bits_per_byte:.6g} |" in card


def test_best_is_the_checkpoint_that_did_best_on_the_held_out_documents(make_config: MakeConfig) -> None:
    config = make_config(max_steps=12, eval_every=3, optimizer=OptimizerConfig(lr=0.3, clip=None))
    train(config)
    measured = {row["step"]: row["held_out_bits_per_byte"] for row in figures(config) if row["held_out_bits_per_byte"]}
    assert list(measured) == ["3", "6", "9", "12"]
    best = min(measured, key=lambda step: float(measured[step]))
    assert (Path(config.trainer.output) / "best").resolve().name == f"step-{int(best):08d}"


def test_the_last_row_of_a_step_is_written_whatever_the_interval(make_config: MakeConfig) -> None:
    config = make_config(max_steps=7, log_every=5, data={"held_out_bytes": 0})
    summary = train(config)
    assert [row["step"] for row in figures(config)] == ["5", "7"]
    assert summary.held_out_bits_per_byte is None
    assert not (Path(config.trainer.output) / "best").exists()


def test_a_held_out_figure_is_written_whatever_the_interval(make_config: MakeConfig) -> None:
    config = make_config(max_steps=6, log_every=100, eval_every=2, optimizer=OptimizerConfig(lr=0.3, clip=None))
    train(config)
    assert [row["step"] for row in figures(config) if row["held_out_bits_per_byte"]] == ["2", "4", "6"]


def test_a_run_takes_one_step_however_short_its_time(make_config: MakeConfig) -> None:
    assert train(make_config(max_steps=None, max_minutes=1e-9)).steps == 1


def test_time_can_end_a_run(make_config: MakeConfig) -> None:
    config = make_config(max_steps=None, max_minutes=0.01, save_every=10**6, eval_every=10**6)
    summary = train(config)
    assert summary.seconds >= 0.6
    assert summary.steps == len(figures(config)) > 1
    late = float(figures(config)[-1]["learning_rate"]) / config.optimizer.lr
    assert late == pytest.approx(config.schedule.min_lr_ratio, abs=0.2)


def test_a_finished_run_has_nothing_left_to_do_and_a_longer_one_goes_on(make_config: MakeConfig) -> None:
    first = train(make_config(max_steps=3))
    again = train(make_config(max_steps=3))
    assert again == dataclasses.replace(first, resumed_at=3, seconds=again.seconds)
    longer = train(make_config(max_steps=5))
    assert (longer.resumed_at, longer.steps) == (3, 5)
    assert longer.seconds > first.seconds
    with pytest.raises(UserError, match="holds a run already"):
        train(make_config(max_steps=7), resume="never")


def test_the_average_of_the_weights_is_what_is_kept(make_config: MakeConfig) -> None:
    once, twice = (
        weights(train(make_config(f"{steps}", max_steps=steps, max_minutes=9e9)).checkpoint) for steps in (1, 2)
    )
    averaged = train(make_config("average", max_steps=2, ema_decay=0.75))
    expected = 0.75 * once + 0.25 * twice
    torch.testing.assert_close(weights(averaged.checkpoint), expected)
    assert not torch.equal(once, twice)


def test_accumulated_batches_make_the_gradient_of_their_mean(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows in one batch and two batches of one row are the same step, when they are the same rows."""
    seen: list[torch.Tensor] = []
    plain = module.next_token_loss
    monkeypatch.setattr(
        module, "next_token_loss", lambda logits, targets: seen.append(targets) or plain(logits, targets)
    )
    whole = make_config("whole", max_steps=1, data={"batch_size": 2})
    halves = make_config("halves", max_steps=1, accumulate=2, data={"batch_size": 1})
    after = [weights(train(config).checkpoint) for config in (whole, halves)]
    assert torch.equal(seen[0], torch.cat(seen[1:]))
    assert float(figures(whole)[0]["loss"]) == pytest.approx(float(figures(halves)[0]["loss"]))
    assert float(figures(whole)[0]["gradient_norm"]) == pytest.approx(
        float(figures(halves)[0]["gradient_norm"]), rel=1e-4
    )
    torch.testing.assert_close(*after)


def test_bf16_trains_weights_in_fp32(make_config: MakeConfig) -> None:
    config = make_config(max_steps=3, precision="bf16")
    checkpoint = train(config).checkpoint
    assert all(parameter.dtype == torch.float32 for parameter in LanguageModel.from_pretrained(checkpoint).parameters())
    exact = make_config("exact", max_steps=3)
    train(exact)
    losses = [[float(row["loss"]) for row in figures(one)] for one in (config, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] != losses[1]


def test_packed_documents_train(make_config: MakeConfig) -> None:
    config = make_config(max_steps=3, data={"packing": "packed", "row_length": 600, "batch_size": 1})
    assert math.isfinite(train(config).loss)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"device": "cuda"}, {"device": "mps"}])
def test_what_needs_a_gpu_is_told(make_config: MakeConfig, settings: dict[str, str]) -> None:
    with pytest.raises(UserError, match="GPU"):
        train(make_config(**settings))


def test_a_loss_that_is_no_number_ends_the_run_and_spares_the_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(save_every=2, eval_every=100)
    losses = iter([1.0] * 5 + [float("nan")])
    plain = module.next_token_loss
    monkeypatch.setattr(module, "next_token_loss", lambda *args: plain(*args) * next(losses))
    with pytest.raises(UserError, match="the loss became nan at step 6"):
        train(config)
    assert (Path(config.trainer.output) / "last").resolve().name == "step-00000004"
    assert weights(Path(config.trainer.output) / "last").isfinite().all()


def test_weights_that_ran_away_are_not_saved(make_config: MakeConfig) -> None:
    config = make_config(save_every=1, optimizer=OptimizerConfig(lr=1e38, clip=None))
    with pytest.raises(UserError, match=r"a weight became infinite or NaN|became (nan|inf)"):
        train(config)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": dataclasses.replace(TINY, n_layer=4)}, r"model\.n_layer was 2, now 4"),
        ({"optimizer": OptimizerConfig(lr=5e-4)}, r"optimizer\.lr was 0\.001, now 0\.0005"),
        ({"ema_decay": 0.5}, r"trainer\.ema_decay was None, now 0\.5"),
        ({"precision": "bf16"}, r"trainer\.precision was 'fp32', now 'bf16'"),
        ({"accumulate": 2}, r"trainer\.accumulate was 1, now 2"),
        ({"data": {"seed": 1}}, "the data is not what this run began with"),
    ],
)
def test_a_run_cannot_change_what_it_is_made_of(
    make_config: MakeConfig, changed: dict[str, object], named: str
) -> None:
    train(make_config(max_steps=1))
    with pytest.raises(UserError, match=named):
        train(make_config(max_steps=2, **changed))


@pytest.mark.parametrize("content", [{}, {"kind": "trainer", "output": "run", "max_steps": 1}])
def test_a_checkpoint_without_its_config_is_told(make_config: MakeConfig, content: dict[str, object]) -> None:
    checkpoint = train(make_config(max_steps=1)).checkpoint
    write_json(checkpoint / "train.json", content)
    with pytest.raises(FileProblem, match=r"train\.json' is not the config of a run"):
        train(make_config(max_steps=2))


def test_a_vocabulary_too_small_for_the_tokenizer_is_told(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="at least 257"):
        train(make_config(model=dataclasses.replace(TINY, vocab_size=256)))


def test_a_folder_that_cannot_be_written_is_told_before_training(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileProblem, match="not a folder"):
        train(make_config("file/run"))


def test_tensorboard_gets_the_figures(make_config: MakeConfig) -> None:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    config: TrainConfig = make_config(max_steps=2, tensorboard=True)
    train(config)
    assert list((Path(config.trainer.output) / "tensorboard").glob("events.out.*"))
