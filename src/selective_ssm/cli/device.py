"""Where a verb's model runs: the options ``--device`` and ``--dtype``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from selective_ssm.models.device import usable_device

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selective_ssm.cli.parser import Parser

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_device(parser: Parser) -> None:
    """Take ``--device``."""
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, cuda:1, mps, …")


def add_dtype(parser: Parser) -> None:
    """Take ``--dtype``."""
    dtype = Literal["fp32", "bf16", "fp16"]
    parser.add_argument("--dtype", type=dtype | None, default=None, help="of the weights; by default as saved")


def placement(options: Namespace) -> dict[str, Any]:
    """The keyword arguments that put a model where the options say."""
    return {"device": usable_device(options.device), "dtype": DTYPES.get(options.dtype)}
