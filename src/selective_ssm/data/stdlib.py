"""The running Python's own standard library as a source of text: real code that is already on every machine."""

from __future__ import annotations

import sysconfig
from pathlib import Path

STDLIB = "python_stdlib"
"""The word that stands for this source."""

EXCLUDED = frozenset(
    {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
)
"""Names of folders that are left out, wherever they stand: tests, tables of characters, and what was installed."""


def stdlib_folder() -> Path:
    """Where the standard library's sources lie; in a virtual environment, those of its base."""
    return Path(sysconfig.get_path("stdlib"))
