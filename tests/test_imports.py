"""Imports run downward only, and the light parts of the package stay light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SOURCE = Path(__file__).parents[1] / "src" / "selective_ssm"

FLOOR = ("errors", "files", "config")
DIRECTLY_BELOW = {
    "errors": FLOOR,
    "files": FLOOR,
    "config": FLOOR,
    "plots": FLOOR,
    "ops": FLOOR,
    "data": FLOOR,
    "layers": ("ops",),
    "models": ("layers",),
    "tasks": ("data",),
    "generation": ("models", "data"),
    "interop": ("models", "data"),
    "evaluation": ("generation", "tasks"),
    "training": ("evaluation",),
    "experiments": ("training", "plots"),
    "bench": ("experiments", "interop"),
    "recipes": FLOOR,
    "cli": ("bench", "recipes"),
    "__main__": ("cli",),
    "__init__": ("ops", "layers", "models", "generation"),
}


def below(room: str) -> set[str]:
    """The room itself and every room that it may import: what it stands on, and what that stands on."""
    found: set[str] = set()
    waiting = {room}
    while waiting:
        found |= waiting
        waiting = {lower for one in waiting for lower in DIRECTLY_BELOW[one]} - found
    return found


def imported_rooms(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and room of each import of ours, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [f"{alias.name}.__init__" for alias in node.names]
        else:
            continue
        for module in modules:
            package, room = module.split(".")[:2]
            if package == "selective_ssm":
                yield node.lineno, room


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_downward_only(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    allowed = below(room)
    for line, imported in imported_rooms(ast.parse(path.read_bytes())):
        assert imported in allowed, f"{path}:{line}: '{room}' may not import '{imported}'"


def run(script: str, *arguments: str) -> str:
    process = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_package_loads_without_heavy_neighbours() -> None:
    loaded = run("import sys, selective_ssm; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert "torch" in loaded
    assert not {"lightning", "pytorch_lightning", "transformers", "jsonargparse", "matplotlib"} & set(loaded)


def base_distributions() -> set[str]:
    """Everything that a plain `pip install selective-ssm` brings."""
    found: set[tuple[str, str]] = set()
    waiting = {("selective-ssm", "")}
    while waiting:
        found |= waiting
        waiting = {
            (canonical(requirement.name), extra)
            for name, wanted in waiting
            for requirement in map(Requirement, requires(name) or ())
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted})
            for extra in ("", *requirement.extras)
        } - found
    return {name for name, _ in found}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


IMPORT_ALL = """
import importlib, importlib.machinery, pkgutil, sys

finders, modules, base = list(sys.meta_path), *map(str.split, sys.argv[1:])

class BaseOnly:
    @staticmethod
    def find_distributions(context):
        found = importlib.machinery.PathFinder.find_distributions(context)
        return (one for one in found if one.name.lower().replace("_", "-") in base)

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in modules:
            return next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)

sys.meta_path[:] = [BaseOnly]
import selective_ssm
for module in pkgutil.walk_packages(selective_ssm.__path__, "selective_ssm."):
    importlib.import_module(module.name)
    print(module.name)
"""


def test_every_module_loads_with_the_base_dependencies_only() -> None:
    base = base_distributions()
    owners = packages_distributions().items()
    absent = [module for module, names in owners if not {canonical(name) for name in names} & base]
    assert {"matplotlib", "transformers", "tensorboard", "pytest"} <= set(absent)
    imported = run(IMPORT_ALL, " ".join(absent), " ".join(base)).split()
    assert {"selective_ssm.errors", "selective_ssm.ops.native"} <= set(imported)
