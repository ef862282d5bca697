"""What the README shows works: its Python and its commands run, in the order in which one reads them.

`make` lines are checked to exist. A comment right above a block steers it: `<!-- not run: reason -->` skips it, and
`<!-- run with: --trainer.max_steps 3 -->` appends these arguments to its `selective-ssm train` lines.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from selective_ssm.cli.parser import Parser, config_from
from selective_ssm.training.config import KINDS, TrainConfig

ROOT = Path(__file__).parents[1]
FENCED = re.compile(
    r"(?:<!-- (?P<marker>not run|run with): (?P<text>.*?) -->\n)?```(?P<language>python|sh)\n(?P<code>.*?)```\n", re.S
)


class Block(NamedTuple):
    line: int
    language: str
    code: str
    skipped: str
    """Why the block is not run, or nothing."""


def blocks() -> list[Block]:
    readme = (ROOT / "README.md").read_text()
    found: list[Block] = []
    for match in FENCED.finditer(readme):
        marker, text, language, code = match.group("marker", "text", "language", "code")
        if marker == "run with":
            code = re.sub(r"^(selective-ssm train\b.*)$", rf"\1 {text}", code, flags=re.M)
        found.append(
            Block(readme[: match.start("code")].count("\n") + 1, language, code, text if marker == "not run" else "")
        )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all blocks run, so that a later one finds what an earlier one wrote."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"line_{block.line}")
def test_block(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.skipped:
        pytest.skip(block.skipped)
    monkeypatch.chdir(folder)
    if block.language == "python":
        exec(compile(block.code, f"README.md, block at line {block.line}", "exec"), {"__name__": "__main__"})
    else:
        run_commands(block.code)


def test_each_recipe_shown_is_a_whole_config(tmp_path: Path) -> None:
    shown = re.findall(r"```yaml\n(.*?)```\n", (ROOT / "README.md").read_text(), re.S)
    assert shown
    for recipe in shown:
        (tmp_path / "recipe.yaml").write_text(recipe)
        parser = Parser("train", "")
        parser.add_config(TrainConfig)
        options = parser.parse_args(["--config", str(tmp_path / "recipe.yaml")])
        assert config_from(options, TrainConfig, KINDS).model.n_layer > 0


def run_commands(code: str) -> None:
    commands = "\n".join(line for line in code.splitlines() if not line.startswith("make "))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], env={**os.environ, "PATH": path}, capture_output=True, timeout=120
    )
    assert process.returncode == 0, process.stderr.decode()


def test_the_two_commands_are_shown_and_every_make_target_exists() -> None:
    shown = {
        target
        for block in blocks()
        if block.language == "sh"
        for target in re.findall(r"^make (\S+)", block.code, re.M)
    }
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test"} <= shown
    assert shown <= targets
