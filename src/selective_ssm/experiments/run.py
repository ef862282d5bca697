"""One training of a small model on a synthetic task, which goes on where it was interrupted."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selective_ssm.config import to_tagged
from selective_ssm.errors import FileProblem
from selective_ssm.experiments.cell import CellConfig, Run
from selective_ssm.experiments.examination import NOTHING_ASKED, drawn_together, examined
from selective_ssm.experiments.learner import Learner
from selective_ssm.files import owned, read_json, read_metadata, read_tensors, write_json, write_tensors
from selective_ssm.tasks import Recall, Share, SyntheticTask, generator_of
from selective_ssm.training.rng import seed_all
from selective_ssm.training.schedule import learning_rate_factor

STATE = "state.safetensors"
RESULT = "result.json"
_LOOKS = 50  # points of a curve
_LOOK_ROWS = 256
_SAVE_SECONDS = 60.0
_FIRST_TEST = 2**20
"""The batch from which on tests are drawn; those before it are for looks at a run under way."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """How far a run was at one step.

    Args:
        step: steps behind it.
        loss: the mean of the training loss since the look before, in nats an answer.
        tokens: the share of right answers, on rows that are not learned from.
        sequences: the share of rows with all answers right.
    """

    step: int
    loss: float
    tokens: float
    sequences: float


class Training:
    """A run under way: what learns, and what was seen so far.

    Args:
        cell: what is learned, by what.
        run: which of its runs.
        device: where.
    """

    def __init__(self, cell: CellConfig, run: Run, device: torch.device) -> None:
        self.cell, self.run, self.device = cell, run, device
        seed_all(run.seed)
        self.learner = Learner(cell, run.learning_rate, device)
        self.step = 0
        self.seconds = 0.0
        self.looks: list[Look] = []
        self.tests: dict[int, Recall] = {}
        self.ran_away = False
        self._losses: list[Tensor] = []

    @property
    def has_learned(self) -> bool:
        """Whether all steps are behind it, or all that made sense."""
        return self.ran_away or self.step >= self.cell.steps

    @property
    def is_done(self) -> bool:
        """Whether all tests are, too."""
        return self.has_learned and self._untested() is None

    def advance(self) -> None:
        """Take one step, or, after the last one, a part of the tests."""
        if self.has_learned:
            self.examine()
        else:
            began = time.monotonic()
            self.learn()
            self.seconds += time.monotonic() - began

    def learn(self) -> None:
        """Take one step."""
        cell = self.cell
        factor = learning_rate_factor(cell.schedule, step=self.step, progress=self.step / cell.steps)
        batch = cell.task.draw(cell.batch_size, generator_of(self.run.seed, self.device, step=self.step))
        self._losses.append(self.learner.learn(batch, factor))
        self.step += 1
        if self.has_learned or self.step % max(1, cell.steps // _LOOKS) == 0:
            self._look()

    def _look(self) -> None:
        loss = float(torch.stack(self._losses).mean())
        self._losses.clear()
        self.ran_away = not math.isfinite(loss)
        if self.ran_away:
            return
        found = self._examined(self.cell.task, min(_LOOK_ROWS, self.cell.test_rows))
        shares = {"tokens": found.tokens.value, "sequences": found.sequences.value}
        self.looks.append(Look(step=self.step, loss=loss, **shares))

    def examine(self) -> None:
        """Test on rows that are drawn together, at the shortest length that is not tested enough."""
        length = self._untested()
        assert length is not None
        before = self.tests.get(length, NOTHING_ASKED)
        rows = before.sequences.all
        together = drawn_together(length, self.device)
        task, some = replace(self.cell.task, length=length), min(together, self.cell.tests[length] - rows)
        self.tests[length] = before + self._examined(task, some, first=_FIRST_TEST + rows // together)

    def _examined(self, task: SyntheticTask, rows: int, *, first: int = 0) -> Recall:
        with self.learner.precision():
            return examined(self.learner.model, task, rows, first=first)

    def _untested(self) -> int | None:
        wanted = self.cell.tests
        rows = {length: self.tests.get(length, NOTHING_ASKED).sequences.all for length in wanted}
        return next((length for length in wanted if rows[length] < wanted[length]), None)

    def save(self, path: Path) -> None:
        """Write all that going on needs."""
        tensors = {f"model.{name}": tensor for name, tensor in self.learner.model.state_dict().items()}
        for index, moments in self.learner.moments.items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        if self._losses:
            tensors["losses"] = torch.stack(self._losses)
        known = {"cell": to_tagged(self.cell), "run": self.run, "step": self.step, "seconds": self.seconds}
        known["ran away"] = self.ran_away
        seen = {
            "looks": [asdict(look) for look in self.looks],
            "tests": {length: asdict(found) for length, found in self.tests.items()},
        }
        write_tensors(path, tensors, {"run": json.dumps({**known, **seen})})

    def restore(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            FileProblem: it is of another run, or of none.
        """
        known, tensors = _known(path), read_tensors(path, self.device)
        if known.get("cell") != to_tagged(self.cell) or known.get("run") != list(self.run):
            raise FileProblem(f"'{path}' is of another run than {self.run.name} of this cell: choose another folder")
        self.learner.model.load_state_dict(_part(tensors, "model"))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _part(tensors, "optimizer").items():
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = tensor
        self.learner.moments = moments
        self.step, self.seconds, self.ran_away = known["step"], known["seconds"], known["ran away"]
        self.looks = [Look(**look) for look in known["looks"]]
        self.tests = {
            int(length): Recall(**{what: Share(**share) for what, share in found.items()})
            for length, found in known["tests"].items()
        }
        self._losses = list(tensors["losses"]) if "losses" in tensors else []


def go_on(cell: CellConfig, run: Run, folder: Path, device: torch.device, *, until: Callable[[], bool]) -> bool:
    """Train and test until the run is done or time is up; what is left to do is in the folder then.

    Args:
        cell: the cell.
        run: which of its runs.
        folder: the run's, made if absent.
        device: where to train.
        until: asked after each step, and each part of the tests, whether time is up.

    Returns:
        Whether it is done; its result is in the folder then, and what only going on needed is not. A run whose loss is
        no number any more is done, too: it is tested as it is.

    Raises:
        FileProblem: another process trains in the folder, or what is there is of another run.
    """
    with owned(folder / "lock", taken=f"another process trains in '{folder}'"):
        if (folder / RESULT).exists():
            return True
        training = Training(cell, run, device)
        if (folder / STATE).exists():
            training.restore(folder / STATE)
        saved = time.monotonic()
        while not training.is_done:
            training.advance()
            now = time.monotonic()
            is_over = until() and not training.is_done
            if is_over or now - saved > _SAVE_SECONDS:
                training.save(folder / STATE)
                saved = now
            if is_over:
                return False
        write_json(folder / RESULT, _result(training))
        (folder / STATE).unlink(missing_ok=True)
        return True


def result_of(folder: Path) -> dict[str, Any] | None:
    """What a run that is done came to."""
    return read_json(folder / RESULT) if (folder / RESULT).exists() else None


def steps_of(folder: Path) -> int:
    """How many steps of a run that is not done are behind it."""
    return _known(folder / STATE)["step"] if (folder / STATE).exists() else 0


def _result(training: Training) -> dict[str, Any]:
    return {
        "learning_rate": training.run.learning_rate,
        "seed": training.run.seed,
        "steps": training.step,
        "ran away": training.ran_away,
        "seconds": training.seconds,
        "parameters": sum(training.learner.model.num_parameters().values()),
        "tests": {str(length): asdict(found) for length, found in training.tests.items()},
        "looks": [asdict(look) for look in training.looks],
    }


def _known(path: Path) -> dict[str, Any]:
    """What a state's file says of its run."""
    try:
        return json.loads(read_metadata(path)["run"])
    except (KeyError, json.JSONDecodeError) as error:
        raise FileProblem(f"'{path}' is not the state of a run") from error


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {one.removeprefix(f"{name}."): tensor for one, tensor in tensors.items() if one.startswith(f"{name}.")}
