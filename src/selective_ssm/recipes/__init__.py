"""Whole experiments that ship with the package, each a YAML file of ten to thirty lines."""

from __future__ import annotations

from pathlib import Path

from selective_ssm.errors import UserError, choice, nearest

_FOLDER = Path(__file__).parent


def recipes() -> list[str]:
    """The names of the shipped recipes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        UserError: there is none of that name.

    Example:
        >>> recipe_path("stdlib_bytes").name
        'stdlib_bytes.yaml'
    """
    if name not in recipes():
        raise UserError(f"there is no recipe '{name}'{nearest(name, recipes())}: choose one of {', '.join(recipes())}")
    return _FOLDER / f"{name}.yaml"


def cells(table: str) -> list[str]:
    """The names of the cells of one of the paper's tables, sorted.

    Example:
        >>> "mamba-s6" in cells("table1")
        True
    """
    return sorted(path.stem for path in (_FOLDER / table).glob("*.yaml"))


def cell_path(table: str, name: str) -> Path:
    """The recipe of a cell.

    Raises:
        UserError: there is none of that name.
    """
    choice("cell", name, cells(table))
    return _FOLDER / table / f"{name}.yaml"
