"""A checkpoint's README.md says what it is, and nobody's own is overwritten."""

from __future__ import annotations

from pathlib import Path

import yaml

from selective_ssm.models import LanguageModel, LanguageModelConfig
from selective_ssm.models.card import Card

MODEL = LanguageModelConfig(d_model=8, n_layer=1, vocab_size=257)


def save(folder: Path, card: Card | None = None) -> str:
    LanguageModel(MODEL).save_pretrained(folder, card=card)
    return (folder / "README.md").read_text()


def test_what_it_says(tmp_path: Path) -> None:
    said = save(tmp_path, Card(data="`python_stdlib`", metrics={"bits per byte": 1.25, "steps": 880}, licence="mit"))
    header = yaml.safe_load(said.split("---\n")[1])
    assert header["license"] == "mit"
    assert header["pipeline_tag"] == "text-generation"
    count = sum(parameter.numel() for parameter in LanguageModel(MODEL).parameters())
    assert f"{count:,} parameters: 1 layers (mamba) of width 8 over 257 tokens" in said
    assert '"d_model": 8' in said
    assert "## Data\n\n`python_stdlib`\n" in said
    assert "| bits per byte | 1.25 |\n| steps | 880 |\n" in said


def test_what_is_not_known_is_said_to_be_so(tmp_path: Path) -> None:
    said = save(tmp_path)
    assert "license: unknown\n" in said
    assert "## Data\n\nNot said.\n" in said
    assert "## Metrics\n\nNone given.\n" in said


def test_a_licence_that_was_written_into_it_stays(tmp_path: Path) -> None:
    said = save(tmp_path)
    (tmp_path / "README.md").write_text(said.replace("license: unknown", "license: apache-2.0"))
    assert "license: apache-2.0\n" in save(tmp_path, Card(data="other texts"))
    assert "license: mit\n" in save(tmp_path, Card(licence="mit"))


def test_somebody_else_s_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    assert save(tmp_path) == "mine"


def test_one_without_the_marked_line_is_somebody_else_s(tmp_path: Path) -> None:
    said = save(tmp_path)
    mine = "".join(line for line in said.splitlines(True) if not line.startswith("<!--")) + "Mine.\n"
    assert len(mine.splitlines()) == len(said.splitlines())
    (tmp_path / "README.md").write_text(mine)
    assert save(tmp_path) == mine
