"""``selective-ssm train``: train a language model as a config says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selective_ssm.cli.parser import config_from
from selective_ssm.errors import require
from selective_ssm.interop import peft
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
    if config.lora.r:
        require("peft", "peft")
    # Loads Lightning: seconds that a mistake in the config need not wait for.
    from selective_ssm.training.run import train

    summary = train(config, adapters=peft)
    if summary.resumed_at and summary.resumed_at == summary.steps:
        print(
            f"the run in '{config.trainer.output}' is finished at step {summary.steps}: "
            "raise trainer.max_steps or trainer.max_minutes to go on"
        )
    elif summary.resumed_at:
        print(f"the run went on from step {summary.resumed_at} to step {summary.steps}")
    print(f"the model is in '{summary.checkpoint}'")
