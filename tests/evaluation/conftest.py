"""Small files of the harness's sets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.evaluation.rows import ROWS, WIKITEXT


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small file of each set."""
    folder = tmp_path_factory.mktemp("sets")
    for name, rows in ROWS.items():
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    with gzip.open(folder / "wiki.test.tokens.gz", "wt", encoding="utf-8") as file:
        file.write(WIKITEXT)
    return folder
