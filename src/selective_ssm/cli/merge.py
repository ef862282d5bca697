"""``selective-ssm merge``: a checkpoint and adapters for it become one checkpoint like any other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selective_ssm.errors import require
from selective_ssm.generation import load
from selective_ssm.interop.peft import load_adapters, merged

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selective_ssm.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("checkpoint", type=str, help="a checkpoint's folder")
    parser.add_argument("adapter", type=str, help="the folder of LoRA adapters, as train and PEFT write them")
    parser.add_argument("output", type=str, help="the folder of the new checkpoint")


def run(options: Namespace) -> None:
    """Add the adapters to the weights, and write the model with its tokenizer."""
    require("peft", "peft")
    model, tokenizer = load(options.checkpoint)
    load_adapters(model, options.adapter)
    merged(model).save_pretrained(options.output)
    if tokenizer is not None:
        tokenizer.save(options.output)
    print(f"the model is in '{options.output}'")
