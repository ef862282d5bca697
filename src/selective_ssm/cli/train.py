"""``selective-ssm train``: train a language model as a config says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selective_ssm.cli.parser import config_from
from selective_ssm.training.config import KINDS, TrainConfig

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selective_ssm.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Declare the verb's arguments."""
    parser.add_config(TrainConfig)


def run(options: Namespace) -> None:
    """Train, or go on with a run that was interrupted."""
    config = config_from(options, TrainConfig, KINDS)
    # Loads Lightning: seconds that a mistake in the config need not wait for.
    from selective_ssm.training.run import train

    print(f"the model is in '{train(config).checkpoint}'")
