"""A run's folder: checkpoints that appear whole, and the two links `last` and `best` that name them."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import CheckpointIO

from selective_ssm.errors import FileProblem, UserError
from selective_ssm.files import flush, in_words, owned, replacing

_NAME = "step-"

RESUME_FILE = "trainer.pt"
"""What only the trainer needs, beside a checkpoint's model and tokenizer."""

CONFIG_FILE = "train.json"
"""The whole run's config, in each checkpoint."""

ADAPTER_FOLDER = "adapter"
"""The adapters alone, in the checkpoint of a run that trains some; its model has them added into its weights."""


class RunFolder:
    """The folder of one run, and where things lie in it.

    ::

        last -> checkpoints/step-00000200
        best -> checkpoints/step-00000100
        checkpoints/step-00000100/      a usable model, its tokenizer; the run's config, what only resuming needs
        checkpoints/step-00000200/
        metrics.csv                     a row of figures for each logged step
        .lock                           held by the process that trains here

    A checkpoint is written under another name and renamed when it is whole; then a link is replaced in one step, and
    what no link names any more is removed. So `last` and `best` name whole checkpoints at every instant.

    Args:
        path: the folder; made with the first thing that is written into it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.last = self.path / "last"
        self.best = self.path / "best"
        self.metrics = self.path / "metrics.csv"
        self._checkpoints = self.path / "checkpoints"

    @property
    def step(self) -> int:
        """Steps that `last` has behind it; 0 without one."""
        return int(self.last.resolve().name.removeprefix(_NAME)) if self.resumable else 0

    @property
    def resumable(self) -> bool:
        """Whether the folder holds a run already.

        Raises:
            UserError: it holds something else, such as a copy of a run that left its links behind.
        """
        if self.last.exists() and not self.last.is_symlink():
            raise UserError(
                f"'{self.last}' should be a link to a checkpoint: copy a run with its links, as 'cp -a' does, or "
                "choose another output folder"
            )
        return self.last.is_symlink()

    @contextmanager
    def alone(self) -> Generator[None]:
        """Keep other processes from training in this folder while the block runs.

        Raises:
            UserError: one does already.
        """
        taken = f"another process trains in '{self.path}': wait until it has ended, or choose another output folder"
        with owned(self.path / ".lock", taken=taken):
            yield

    @contextmanager
    def checkpoint(self, step: int, *, best: bool) -> Generator[Path]:
        """Write a checkpoint: the block fills the folder it is given, and then `last` (and `best`) names it.

        Raises:
            FileProblem: it cannot be written; the checkpoints that are there stay as they are.
        """
        finished = self._checkpoints / f"{_NAME}{step:08d}"
        unfinished = finished.with_name(f".{finished.name}")
        with in_words("write", finished):
            self._sweep()
            unfinished.mkdir(parents=True)
            try:
                yield unfinished
                os.replace(unfinished, finished)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            flush(self._checkpoints)
            for link in (self.last, self.best) if best else (self.last,):
                self._point(link, finished)
            self._sweep()

    def point_best_at_last(self) -> None:
        """Let `best` name what `last` does: what a process that was killed between the two links left undone."""
        with in_words("write", self.best):
            self._point(self.best, self._checkpoints / self.last.resolve().name)
            self._sweep()

    def _point(self, link: Path, checkpoint: Path) -> None:
        temporary = link.with_name(f".{link.name}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(checkpoint.relative_to(self.path), target_is_directory=True)
        os.replace(temporary, link)
        flush(self.path)

    def _sweep(self) -> None:
        """Remove what neither link names: older checkpoints, and what a killed process left unfinished."""
        named = {link.resolve() for link in (self.last, self.best)}
        with suppress(FileNotFoundError):
            for folder in self._checkpoints.iterdir():
                if folder.name.lstrip(".").startswith(_NAME) and folder.resolve() not in named:
                    shutil.rmtree(folder)


class ResumeFile(CheckpointIO):
    """Lets Lightning write its state straight into the file, atomically, and read it without executing any of it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch hides the full disk behind an error of its zip writer
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        with in_words("read", path):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise FileProblem(f"'{path}' is not a whole trainer's file (truncated or foreign)") from error

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink()
