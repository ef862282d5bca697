"""``selective-ssm evaluate``: how well a checkpoint predicts whole documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selective_ssm.cli.device import add_device, add_dtype, placement
from selective_ssm.data import documents
from selective_ssm.errors import UserError
from selective_ssm.evaluation import evaluate
from selective_ssm.generation import load

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selective_ssm.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("checkpoint", type=str, help="a checkpoint's folder")
    parser.add_argument("--data", type=str, required=True, help="a file, a folder or a glob; or python_stdlib")
    parser.add_argument("--text-field", type=str, default="text", help="the field of a JSON line that holds the text")
    add_device(parser)
    add_dtype(parser)


def run(options: Namespace) -> None:
    """Evaluate, and print loss, perplexity and bits per byte."""
    model, tokenizer = load(options.checkpoint, **placement(options))
    if tokenizer is None:
        raise UserError(f"the checkpoint '{options.checkpoint}' has no tokenizer, so it cannot read text")
    result = evaluate(model, documents(options.data, text_field=options.text_field), tokenizer)
    print(f"loss           {result.loss:.4f} nats a token")
    print(f"perplexity     {result.perplexity:.4f}")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    print(f"tokens         {result.tokens:,}")
    print(f"bytes          {result.bytes:,}")
