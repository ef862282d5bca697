"""The command line as a whole: help, exit codes, and that it loads no more than it needs."""

from __future__ import annotations

import importlib.metadata
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from selective_ssm import cli
from selective_ssm.cli import info, main

SOURCE = Path(cli.__file__).parents[2]
HEAVY = {"lightning", "pytorch_lightning", "transformers", "matplotlib"}


def test_help_names_every_verb_and_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["-h"], []):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert all(f"  {verb} " in shown for verb in cli.VERBS)
    verbs = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - {"__init__", "parser", "device", "prompts"}
    assert verbs == set(cli.VERBS)


def test_the_version_is_the_installed_one_or_says_that_there_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"selective-ssm {importlib.metadata.version('selective-ssm')}\n"

    def none(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", none)
    assert main(["--version"]) == 0
    assert "source tree" in capsys.readouterr().out


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["genrate"]) == 2
    assert "unknown command 'genrate' (did you mean 'generate'?)" in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: selective-ssm {verb}" in shown
    assert "--debug" in shown


def test_a_fault_of_ours_is_one_sentence_and_debug_shows_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(info, "run", broken)
    assert main(["info", "mamba-130m"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("selective-ssm: internal error, RuntimeError: two lines (")
    assert "--debug" in told
    assert len(told.splitlines()) == 1
    assert main(["info", "mamba-130m", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_where_a_mistake_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "mamba-130", "--debug"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert told.splitlines()[-1].startswith("selective-ssm: there is no folder")


def test_what_the_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert main(["--help"]) == 0
    assert b"selective-ssm COMMAND \\u2026" in shown.getvalue()


def python(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    return subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120, env=environment
    )


def test_help_generate_and_info_never_load_heavy_packages(checkpoint: Path) -> None:
    script = (
        "import sys, time\n"
        "import selective_ssm\n"
        "face = set(sys.modules)\n"
        "from selective_ssm.cli import main\n"
        "assert main(['--help']) == 0\n"
        "print('help adds', *sorted({name.partition('.')[0] for name in set(sys.modules) - face}))\n"
        "assert time.process_time() < 3\n"
        "assert main(['train', '--help']) == 0\n"
        "assert main(['generate', sys.argv[1], '--max-new-tokens', '1']) == 0\n"
        "assert main(['info', sys.argv[1]]) == 0\n"
        "print('all', *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    process = python(script, str(checkpoint))
    assert process.returncode == 0, process.stderr
    lines = {line.partition(" ")[0]: set(line.split()) for line in process.stdout.splitlines()}
    assert not lines["help"] & (HEAVY | {"torch", "jsonargparse", "rich", "numpy"})
    assert not lines["all"] & HEAVY
