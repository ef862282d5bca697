"""How real processes end: Ctrl-C, SIGTERM, a reader that has left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from selective_ssm import cli
from selective_ssm.cli import info, main

TRAINING = """
model: {d_model: 8, n_layer: 1, vocab_size: 257}
data: {row_length: 16, batch_size: 1}
trainer: {max_steps: 1000000}
"""


class Running:
    """A process of the command line, and the file in which its work shows."""

    def __init__(self, *words: str | Path, output: Path, work: Path) -> None:
        self.work = work
        environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "selective_ssm", *map(str, words)]
        with open(output, "wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, env=environment)

    def wait_until_at_work(self, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while not (self.work.exists() and self.work.stat().st_size > 500):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, "it never began"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def running(ids_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Running]]:
    """Both at once, since loading torch is what takes the time."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "config.yaml").write_text(TRAINING)
    (folder / "text.txt").write_text("some text " * 100)
    generate = ("generate", ids_checkpoint, "--prompt", "1", "--max-new-tokens", "1000000000")
    train = ("train", "--config", folder / "config.yaml", "--data.source", folder / "text.txt")
    train = (*train, "--data.cache", folder / "cache", "--trainer.output", folder / "run")
    started = {
        "generate": Running(*generate, output=folder / "ids", work=folder / "ids"),
        "train": Running(*train, output=Path(os.devnull), work=folder / "run" / "metrics.csv"),
    }
    yield started
    for one in started.values():
        one.process.kill()
        one.process.communicate()


@pytest.mark.parametrize(("verb", "number", "code"), [("generate", signal.SIGTERM, 143), ("train", signal.SIGINT, 130)])
def test_a_signal_ends_a_verb_with_its_customary_code(
    running: dict[str, Running], verb: str, number: signal.Signals, code: int
) -> None:
    one = running[verb]
    one.wait_until_at_work()
    one.process.send_signal(number)
    _, told = one.process.communicate(timeout=60)
    assert one.process.returncode == code, told.decode()
    assert b"Traceback" not in told


def test_ctrl_c_is_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    assert main(["info", "mamba-130m"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (7, 7), ("said why", 1)])
def test_whoever_leaves_takes_the_code_along(
    code: str | int | None, expected: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaving(_: object) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(info, "run", leaving)
    assert main(["info", "mamba-130m"]) == expected
    assert capsys.readouterr().err == ("said why\n" if expected == 1 else "")


def ended(command: str) -> subprocess.CompletedProcess[str]:
    """How a line of the shell ends, in which ``ssm`` is the command line."""
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    script = f'set -o pipefail; ssm() {{ "{sys.executable}" -m selective_ssm "$@"; }}; {command}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("words", ["doctor", "info mamba-130m", "train --help"])
def test_every_verb_ends_quietly_when_its_reader_has_left(words: str) -> None:
    process = ended(f"ssm {words} | true")
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_sentence_that_nobody_reads_keeps_its_code() -> None:
    assert ended("ssm info nosuch 2>&1 | true").returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["recipes", "info mamba-130m"])
def test_a_full_output_is_told_in_one_sentence(words: str) -> None:
    process = ended(f"ssm {words} > /dev/full")
    assert process.returncode == 2
    assert process.stderr == "selective-ssm: cannot write to the standard output: no space left on device\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_closed_output_is_told_in_one_sentence() -> None:
    process = ended("ssm recipes >&-")
    assert process.returncode == 2
    assert process.stderr == "selective-ssm: the standard output is closed: there is nowhere to write to\n"


def test_a_lack_of_memory_is_told_in_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "run", lambda _: torch.empty(2**60, dtype=torch.uint8))
    assert main(["info", "mamba-130m"]) == 2
    assert capsys.readouterr().err.startswith("selective-ssm: there is not enough memory for this")


def test_a_reader_that_leaves_ends_it_quietly(ids_checkpoint: Path) -> None:
    words = ["generate", str(ids_checkpoint), "--prompt", "1", "--max-new-tokens", "1000000000"]
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    command = [sys.executable, "-m", "selective_ssm", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        told = process.stderr.read().decode()
    assert process.returncode == 0
    assert told == f"'{ids_checkpoint}' has no tokenizer: prompt and answer are token ids\n"
