"""The run's folder, its links, and the trainer's file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from selective_ssm.errors import FileProblem, UserError
from selective_ssm.training.checkpoint import ResumeFile, RunFolder


def write(run: RunFolder, step: int, *, best: bool = False) -> None:
    with run.checkpoint(step, best=best) as folder:
        (folder / "weights").write_text(str(step))


def kept(run: RunFolder) -> list[str]:
    return sorted(os.listdir(run.path / "checkpoints"))


def test_links_name_the_last_and_the_best_and_nothing_else_is_kept(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert not run.resumable
    assert run.step == 0
    for step, best in ((10, True), (20, True), (30, False), (40, False)):
        write(run, step, best=best)
    assert (run.last / "weights").read_text() == "40"
    assert (run.best / "weights").read_text() == "20"
    assert kept(run) == ["step-00000020", "step-00000040"]
    assert run.step == 40


def test_a_folder_can_be_moved(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    write(run, 7)
    os.rename(run.path, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "last" / "weights").read_text() == "7"


def test_a_copy_without_its_links_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    write(run, 7)
    shutil.copytree(run.path, tmp_path / "copy")
    with pytest.raises(UserError, match="cp -a"):
        RunFolder(tmp_path / "copy").step  # noqa: B018


def test_what_fails_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    write(run, 1, best=True)
    with pytest.raises(FileProblem, match="full"), run.checkpoint(2, best=True):
        raise OSError(28, "No space left on device")
    assert kept(run) == ["step-00000001"]
    assert (run.last / "weights").read_text() == (run.best / "weights").read_text() == "1"


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    write(run, 1)
    for leftover in ("step-00000002", ".step-00000002", ".step-00000003"):
        (run.path / "checkpoints" / leftover).mkdir()
        (run.path / "checkpoints" / leftover / "weights").touch()
    (run.path / ".last").symlink_to("checkpoints/step-00000002")
    (run.path / "checkpoints" / "somebody's").mkdir()
    write(run, 2)
    assert kept(run) == ["somebody's", "step-00000002"]
    assert (run.last / "weights").read_text() == "2"


def test_the_trainers_file_executes_nothing(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"state": Attack()}, tmp_path / "trainer.pt")
    with pytest.raises(FileProblem, match="not a whole trainer's file"):
        ResumeFile().load_checkpoint(tmp_path / "trainer.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("size", [0, 10, 700])
def test_a_truncated_trainers_file_is_told(tmp_path: Path, size: int) -> None:
    path = tmp_path / "trainer.pt"
    ResumeFile().save_checkpoint({"moments": torch.arange(100.0)}, path)
    assert torch.equal(ResumeFile().load_checkpoint(path)["moments"], torch.arange(100.0))
    os.truncate(path, size)
    with pytest.raises(FileProblem, match=r"trainer\.pt"):
        ResumeFile().load_checkpoint(path)
