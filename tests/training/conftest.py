"""Small runs that take a second: a tiny model, some text, a folder of their own."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selective_ssm.data import DataConfig
from selective_ssm.layers import MambaConfig, MLPConfig, S6Config
from selective_ssm.models import LanguageModelConfig
from selective_ssm.training import OptimizerConfig, ScheduleConfig, TrainConfig, TrainerConfig

TINY = LanguageModelConfig(
    d_model=8, n_layer=2, vocab_size=257, pattern=(MambaConfig(ssm=S6Config(d_state=2)), MLPConfig())
)

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small documents."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"{number} times {number} is {number * number}. " * 20)
    return folder


@pytest.fixture
def make_config(texts: Path, tmp_path: Path) -> MakeConfig:
    """Makes the config of a tiny run of 12 steps on the CPU into ``tmp_path / output``; keywords go to the trainer."""

    def make(
        output: str = "run",
        *,
        model: LanguageModelConfig = TINY,
        data: dict[str, Any] | None = None,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        **trainer: Any,
    ) -> TrainConfig:
        cut = {"row_length": 16, "batch_size": 2, "held_out_bytes": 600, "cache": str(texts / ".cache"), **(data or {})}
        often = {"max_steps": 12, "eval_every": 4, "save_every": 3}
        settings = {"output": str(tmp_path / output), "device": "cpu", **often, **trainer}
        return TrainConfig(
            model=model,
            data=DataConfig(source=str(texts / "*.txt"), **cut),
            optimizer=optimizer or OptimizerConfig(),
            schedule=schedule or ScheduleConfig(warmup_steps=3),
            trainer=TrainerConfig(**settings),
        )

    return make


def figures(config: TrainConfig) -> list[dict[str, str]]:
    """The run's metrics as they are written, those that depend on the clock left out."""
    with open(Path(config.trainer.output) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: row[name] for name in row if name not in ("seconds", "tokens_per_second")} for row in rows]
