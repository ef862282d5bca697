"""``selective-ssm recipes``: what ships, and that each one is a whole config."""

from __future__ import annotations

from importlib import resources

import pytest

from selective_ssm.cli import main
from selective_ssm.cli.parser import Parser, config_from
from selective_ssm.recipes import recipes
from selective_ssm.training.config import KINDS, TrainConfig

SHIPPED = sorted(
    path.name.removesuffix(".yaml")
    for path in resources.files("selective_ssm").joinpath("recipes").iterdir()
    if path.name.endswith(".yaml")
)


def test_the_list_shows_each_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    shown = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in shown] == SHIPPED == recipes()
    assert all(len(what) > 10 for _, what in shown)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_is_printed_as_it_is_and_is_a_config(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", name]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# ")
    assert len(printed.splitlines()) <= 40
    parser = Parser("train", "trains")
    parser.add_config(TrainConfig)
    config = config_from(parser.parse_args(["--config", name, "--trainer.max_steps", "7"]), TrainConfig, KINDS)
    assert config.trainer.max_steps == 7
