"""``selective-ssm convert``: a checkpoint in another library's format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from selective_ssm.cli.device import DTYPES, add_dtype
from selective_ssm.data import tokenizer_from
from selective_ssm.interop.convert import convert

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selective_ssm.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Declare the verb's arguments."""
    to = Literal["ours", "hf", "state-spaces", "gguf"]
    parser.add_argument("source", type=str, help="a checkpoint's folder, or a name on the Hugging Face hub")
    parser.add_argument("target", type=str, help="a new folder; a file for gguf")
    parser.add_argument(
        "--to", type=to, required=True, help="ours; hf: transformers; state-spaces: mamba_ssm; gguf: llama.cpp"
    )
    add_dtype(parser)
    parser.add_argument(
        "--tokenizer", type=str | None, default=None, help="bytes, or a file or folder; by default the source's"
    )


def run(options: Namespace) -> None:
    """Convert, and say where the model is."""
    tokenizer = None if options.tokenizer is None else tokenizer_from(options.tokenizer)
    convert(options.source, options.target, options.to, dtype=DTYPES.get(options.dtype), tokenizer=tokenizer)
    print(f"the model is in '{options.target}'")
