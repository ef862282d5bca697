"""``selective-ssm train``: a config file with overrides becomes a checkpoint that the other verbs take."""

from __future__ import annotations

from pathlib import Path

import pytest

from selective_ssm.cli import main


def test_a_run_leaves_a_checkpoint_that_generates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text " * 50)
    Path("config.yaml").write_text(
        "model: {d_model: 8, n_layer: 1, vocab_size: 257}\n"
        "data: {source: text.txt, row_length: 16, batch_size: 1, cache: cache}\n"
        "trainer: {output: run, max_steps: 100}\n"
    )
    assert main(["train", "--config", "config.yaml", "--trainer.max_steps", "2"]) == 0
    first = capsys.readouterr().out
    assert "the model is in 'run/last'" in first
    assert "finished" not in first
    assert "went on" not in first
    assert main(["train", "--trainer.max_steps", "2", "--config", "config.yaml"]) == 0
    told = capsys.readouterr().out
    assert "the run in 'run' is finished at step 2: raise trainer.max_steps or trainer.max_minutes to go on" in told
    assert main(["train", "--config", "config.yaml", "--trainer.max_steps", "3"]) == 0
    assert "the run went on from step 2 to step 3" in capsys.readouterr().out
    assert main(["generate", "run/last", "--prompt", "some", "--max-new-tokens", "3"]) == 0
