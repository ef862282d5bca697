"""What the README and a page of docs show works: Python and commands run, in the order in which one reads them.

A block of Python stands alone in the README; in another page it goes on from those before it. `make` lines are checked
to exist. A comment right above a block steers it: `<!-- not run: reason -->` skips it, and
`<!-- run with: --trainer.max_steps 3 -->` appends these arguments to its `selective-ssm train` lines.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from selective_ssm.cli.parser import Parser, config_from
from selective_ssm.training.config import KINDS, TrainConfig

ROOT = Path(__file__).parents[1]
README = "README.md"
PAGES = (
    README,
    "docs/coming-from-llama-cpp.md",
    "docs/coming-from-mamba-ssm.md",
    "docs/coming-from-transformers.md",
    "docs/evaluation.md",
    "docs/export.md",
    "docs/fine-tuning.md",
    "docs/generation.md",
)
FENCED = re.compile(
    r"(?:<!-- (?P<marker>not run|run with): (?P<text>.*?) -->\n)?```(?P<language>python|sh)\n(?P<code>.*?)```\n", re.S
)


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    skipped: str
    """Why the block is not run, or nothing."""


def blocks(page: str) -> list[Block]:
    content = (ROOT / page).read_text()
    found: list[Block] = []
    for match in FENCED.finditer(content):
        marker, text, language, code = match.group("marker", "text", "language", "code")
        if marker == "run with":
            code = re.sub(r"^(selective-ssm train\b.*)$", rf"\1 {text}", code, flags=re.M)
        line = content[: match.start("code")].count("\n") + 1
        found.append(Block(page, line, language, code, text if marker == "not run" else ""))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where all blocks of a page run, so that a later one finds what an earlier one wrote."""
    return {page: tmp_path_factory.mktemp(Path(page).stem) for page in PAGES}


@pytest.fixture(scope="module")
def names() -> dict[str, dict[str, Any]]:
    """What the Python of each page has defined."""
    return {page: {"__name__": "__main__"} for page in PAGES}


@pytest.mark.parametrize(
    "block", [block for page in PAGES for block in blocks(page)], ids=lambda block: f"{block.page}_line_{block.line}"
)
def test_block(
    block: Block, folders: dict[str, Path], names: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if block.skipped:
        pytest.skip(block.skipped)
    monkeypatch.chdir(folders[block.page])
    if block.language == "python":
        known = {"__name__": "__main__"} if block.page == README else names[block.page]
        exec(compile(block.code, f"{block.page}, block at line {block.line}", "exec"), known)
    else:
        run_commands(block.code)


def test_each_recipe_shown_is_a_whole_config(tmp_path: Path) -> None:
    shown = re.findall(r"```yaml\n(.*?)```\n", (ROOT / README).read_text(), re.S)
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
        for block in blocks(README)
        if block.language == "sh"
        for target in re.findall(r"^make (\S+)", block.code, re.M)
    }
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test"} <= shown
    assert shown <= targets
