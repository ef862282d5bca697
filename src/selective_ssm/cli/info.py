"""``selective-ssm info``: what a checkpoint or a preset costs, without loading a weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import rich
import torch

from selective_ssm.bench.report import table
from selective_ssm.errors import UserError, nearest
from selective_ssm.models import PRESETS, LanguageModel, LanguageModelConfig
from selective_ssm.models.checkpoint import read_config
from selective_ssm.models.hub import located

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selective_ssm.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("model", type=str, help="a checkpoint's folder, or a preset: " + ", ".join(PRESETS))


def run(options: Namespace) -> None:
    """Print the parameters by part, and the memory of weights and state in fp32 and bf16."""
    config = _config(options.model)
    try:
        model = LanguageModel.outline(config)
    except UserError as error:
        raise UserError(f"the model '{options.model}' cannot be built: {error}") from error
    parts = model.num_parameters()
    total = sum(parts.values())
    rows = [{"part": part, "parameters": f"{count:,}"} for part, count in {**parts, "all": total}.items()]
    rich.print(table(rows, title=options.model))
    memory = [
        {
            "dtype": name,
            "weights": _bytes(sum(one.nbytes for one in model.to(dtype).parameters())),
            "state of a sequence": _state(model),
        }
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]
    rich.print(table(memory, title="memory"))


def _config(name: str) -> LanguageModelConfig:
    if name in PRESETS and not Path(name).exists():
        return PRESETS[name]
    folder = located(name)
    if not folder.exists():
        known = ", ".join(PRESETS)
        raise UserError(f"there is no folder '{name}', and no preset of that name{nearest(name, PRESETS)}: {known}")
    return read_config(folder)


def _state(model: LanguageModel) -> str:
    try:
        model.init_state(1)
    except UserError:  # it reads whole texts only
        return "none"
    nothing, a_token = (model.init_state(1, max_length=tokens).nbytes for tokens in (0, 1))
    growth = f", and {a_token - nothing:,} a token" if a_token > nothing else ""
    return f"{nothing:,} bytes{growth}"


def _bytes(count: int) -> str:
    unit, size = next(
        (unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= size or size == 1e3
    )
    return f"{count / size:.2f} {unit}"
