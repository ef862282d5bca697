"""Runs that are killed, told to stop, or starved of disk, and go on as if nothing had happened."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from selective_ssm.config import to_tagged
from selective_ssm.errors import FileProblem, UserError
from selective_ssm.files import read_tensors
from selective_ssm.models import LanguageModel
from selective_ssm.training import TrainConfig, checkpoint
from selective_ssm.training.callbacks import StepEnd
from selective_ssm.training.metrics import CSVMetrics
from selective_ssm.training.progress import Progress
from selective_ssm.training.run import train
from tests.training.conftest import MakeConfig, figures

resource = pytest.importorskip("resource", reason="Windows has no signals, forks or links like these")

SCRIPT = """
import sys, json
from selective_ssm.config import from_tagged
from selective_ssm.training.run import train
from selective_ssm.training.config import KINDS
train(from_tagged(json.loads(sys.argv[1]), KINDS))
"""


def forked(action: Callable[[], object]) -> int | None:
    """Run something in a process of its own, which starts at once with all that is imported here; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(60)
    assert not process.is_alive()
    return process.exitcode


def started(config: TrainConfig) -> subprocess.Popen[bytes]:
    """The run in a fresh interpreter, which leads a process group of its own."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(to_tagged(config))]
    return subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_rows(config: TrainConfig, count: int) -> None:
    """Wait until the run has written so many rows of metrics."""
    metrics = Path(config.trainer.output) / "metrics.csv"
    until = time.monotonic() + 60
    while not metrics.exists() or metrics.read_text().count("\n") <= count:
        assert time.monotonic() < until
        time.sleep(0.002)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def last(config: TrainConfig) -> Path:
    return Path(config.trainer.output) / "last"


def assert_same_outcome(one: TrainConfig, other: TrainConfig) -> None:
    """Every figure of every step, which one was the best, and every weight are bit for bit the same."""
    assert figures(one) == figures(other)
    best = [(Path(config.trainer.output) / "best").resolve(strict=True).name for config in (one, other)]
    assert best[0] == best[1]
    weights = [read_tensors(last(config) / "model.safetensors") for config in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0].keys() | weights[1].keys())


def test_a_run_that_is_killed_and_then_told_to_stop_goes_on_bit_for_bit(make_config: MakeConfig) -> None:
    """With everything that has a state: workers, accumulation, an average of the weights, packed documents."""
    settings = {
        "max_steps": 80,
        "save_every": 7,
        "eval_every": 80,
        "workers": 1,
        "accumulate": 2,
        "ema_decay": 0.9,
        "data": {"packing": "packed", "row_length": 24, "batch_size": 1},
    }
    unbroken, broken = make_config("unbroken", **settings), make_config("broken", **settings)
    with started(broken) as process:
        wait_for_rows(broken, 20)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    killed_at = len(figures(broken))
    assert 20 <= killed_at < 80
    with started(broken) as process:
        wait_for_rows(broken, killed_at + 8)
        os.killpg(process.pid, signal.SIGTERM)  # the workers get it, too
        assert process.wait(30) == 143
    stopped_at = len(figures(broken))
    assert last(broken).resolve().name == f"step-{stopped_at:08d}"
    assert killed_at < stopped_at < 80
    train(broken)
    train(unbroken)
    assert [int(row["step"]) for row in figures(broken)] == list(range(1, 81))
    assert_same_outcome(unbroken, broken)


KILLED_WHILE = {
    "between two checkpoints": (CSVMetrics, "log_metrics", 8),
    "writing the first checkpoint": (LanguageModel, "save_pretrained", 1),
    "writing a model": (LanguageModel, "save_pretrained", 2),
    "writing the trainer's file": (checkpoint.torch, "save", 2),
    "pointing a link at a checkpoint": (checkpoint.RunFolder, "_point", 2),
    "pointing the other link at it": (checkpoint.RunFolder, "_point", 3),
    "pointing the other link at the last one": (checkpoint.RunFolder, "_point", 9),
    "removing the one before": (checkpoint.RunFolder, "_sweep", 4),
}


@pytest.mark.parametrize("moment", KILLED_WHILE)
def test_the_last_checkpoint_is_whole_wherever_a_run_is_killed(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    unbroken, broken = make_config("unbroken"), make_config("broken")
    where, name, occasion = KILLED_WHILE[moment]
    plain, calls = getattr(where, name), iter(range(1, 10**6))

    def deadly(*args: object, **keywords: object) -> object:
        return die() if next(calls) == occasion else plain(*args, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(where, name, deadly)
        assert forked(lambda: train(broken)) == -signal.SIGKILL
    if "first checkpoint" in moment:
        assert not last(broken).exists()
    else:
        LanguageModel.from_pretrained(last(broken))
    train(unbroken)
    train(broken)
    assert_same_outcome(unbroken, broken)
    assert len(os.listdir(Path(broken.trainer.output) / "checkpoints")) <= 2


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_the_step_saves_and_is_passed_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, number: int, error: type[BaseException]
) -> None:
    """Also the evaluation that is due at that step."""
    unbroken, stopped = make_config("unbroken", eval_every=5), make_config("stopped", eval_every=5)
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    plain = StepEnd.on_train_batch_end

    def signalled(*args: object) -> None:
        if len(figures(stopped)) == 4:
            os.kill(os.getpid(), number)
        plain(*args)

    with monkeypatch.context() as patched:
        patched.setattr(StepEnd, "on_train_batch_end", signalled)
        with pytest.raises(error) as raised:
            train(stopped)
    assert number == signal.SIGINT or raised.value.code == 143
    assert last(stopped).resolve().name == "step-00000005"
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
    train(unbroken)
    train(stopped)
    assert_same_outcome(unbroken, stopped)


def test_a_run_outlives_the_reader_of_its_progress(make_config: MakeConfig) -> None:
    config = make_config(max_steps=3)

    def unread() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        sys.stderr = io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True)
        train(config)

    assert forked(unread) == 0
    assert last(config).resolve().name == "step-00000003"


def test_a_checkpoint_is_saved_before_its_step_is_shown(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(save_every=1, eval_every=1)
    seen: list[bool] = []

    def show(_: Progress, step: int, *__: object) -> None:
        seen.append(last(config).resolve().name == f"step-{step:08d}")

    monkeypatch.setattr(Progress, "show", show)
    train(config)
    assert seen == [True] * 12


def test_an_exit_that_no_signal_asked_for_is_passed_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CSVMetrics, "log_metrics", lambda *_: sys.exit(5))
    with pytest.raises(SystemExit) as raised:
        train(make_config())
    assert raised.value.code == 5


def test_a_folder_serves_one_process_at_a_time_and_is_free_when_that_is_killed(make_config: MakeConfig) -> None:
    """Also while the workers of the killed one still live."""
    endless = make_config(max_steps=10**6, eval_every=10**6, workers=1)
    with started(endless) as process:
        wait_for_rows(endless, 3)
        with pytest.raises(UserError, match="another process trains in '.*run': wait until it has ended"):
            train(endless)
        process.kill()
    train(make_config(max_steps=1))


def test_a_failing_step_ends_its_workers_too(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(workers=2)
    monkeypatch.setattr(CSVMetrics, "log_metrics", lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        train(config)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_a_full_disk_is_told_and_spares_the_last_checkpoint(make_config: MakeConfig, small_disk: Path) -> None:
    unbroken, starved = make_config("unbroken"), make_config("disk/run")
    with pytest.raises(FileProblem, match="the disk is full"):
        train(starved)
    assert last(starved).resolve().name == "step-00000006"
    LanguageModel.from_pretrained(last(starved))
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    train(starved)
    train(unbroken)
    assert_same_outcome(unbroken, starved)


def test_a_file_size_limit_is_told_and_spares_the_last_checkpoint(make_config: MakeConfig) -> None:
    config = make_config()

    def starve() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        with pytest.raises(FileProblem, match="beyond the size allowed here"):
            train(config)

    train(make_config(max_steps=2))
    assert forked(starve) == 0
    assert last(config).resolve().name == "step-00000002"
    LanguageModel.from_pretrained(last(config))
