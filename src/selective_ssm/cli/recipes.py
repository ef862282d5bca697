"""``selective-ssm recipes``: the experiments that ship with the package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selective_ssm.recipes import recipe_path, recipes

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selective_ssm.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("recipe", nargs="?", type=str, help="print this one")


def run(options: Namespace) -> None:
    """List the recipes with the first line of each, or print one."""
    if options.recipe is not None:
        print(recipe_path(options.recipe).read_text(encoding="utf-8"), end="")
        return
    width = max(map(len, recipes()))
    for name in recipes():
        first = recipe_path(name).read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:{width}}  {first.removeprefix('#').strip()}")
