"""The house stays readable: short files, short functions."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = sorted(path for folder in ("src", "tests", "examples") for path in (ROOT / folder).rglob("*.py"))
KERNELS = sorted(path for ending in ("cpp", "hpp", "cu", "cuh") for path in (ROOT / "src").rglob(f"*.{ending}"))


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function's name and the number of its lines, its docstring left out."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            has_docstring = ast.get_docstring(node) is not None
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if has_docstring else 0
            yield node.name, node.end_lineno - node.lineno + 1 - docstring


def test_no_file_is_long() -> None:
    assert {str(path): lines(path) for path in PYTHON if lines(path) > 700} == {}
    assert {str(path): lines(path) for path in KERNELS if lines(path) > 900} == {}


def test_most_files_are_short() -> None:
    assert statistics.median(lines(path) for path in PYTHON if "src" in path.parts) <= 200


def test_no_function_is_long() -> None:
    long = {f"{path}: {name}": length for path in PYTHON for name, length in functions(path) if length > 80}
    assert long == {}
