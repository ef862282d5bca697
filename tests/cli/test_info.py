"""``selective-ssm info``: what a model costs, without loading it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from selective_ssm.cli import main
from selective_ssm.layers import PlainConfig, S4DConfig
from selective_ssm.models import LanguageModel, LanguageModelConfig


def test_the_largest_preset_takes_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    assert main(["info", "mamba-2.8b"]) == 0
    assert time.perf_counter() - start < 5
    shown = capsys.readouterr().out
    assert "2,768,345,600" in shown  # 2.8 billion: the released model's
    assert "11.07 GB" in shown
    assert "5.54 GB" in shown


def test_a_state_that_grows_is_told_by_the_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "transformer-125m"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "104 bytes, and 73,728 a token" in shown  # keys and values of 12 layers, 768 wide, in fp32
    assert "104 bytes, and 36,864 a token" in shown


def test_a_model_that_looks_ahead_has_no_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = (PlainConfig(ssm=S4DConfig(d_state=4, bidirectional=True)),)
    LanguageModel(LanguageModelConfig(d_model=4, n_layer=1, vocab_size=8, pattern=pattern)).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    assert "none" in capsys.readouterr().out


def test_a_checkpoint_is_described_part_by_part(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = LanguageModel.from_pretrained(checkpoint)
    assert main(["info", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    parts = model.num_parameters()
    assert all(part in shown and f"{count:,}" in shown for part, count in parts.items())
    assert f"{sum(parts.values()):,}" in shown
    assert f"{model.init_state(1).nbytes:,} bytes" in shown


def test_a_checkpoint_of_impossible_size_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"d_model": 16', '"d_model": 100000000000000000000'))
    assert main(["info", str(copy)]) == 2
    assert f"the model '{copy}' cannot be built: a size in the config is beyond" in capsys.readouterr().err
