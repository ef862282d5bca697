from __future__ import annotations

import hashlib
from pathlib import PurePosixPath

from selective_ssm.data import DataConfig, documents, held_out_documents

RULE = DataConfig(source="python_stdlib", held_out_bytes=64 * 1024, held_out_document_bytes=16 * 1024)


def test_the_standard_library_is_sources_only() -> None:
    every = list(documents("python_stdlib"))
    names = [document.name for document in every]
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert names == sorted(names)
    assert all(name.endswith(".py") for name in names)
    folders = {folder for name in names for folder in PurePosixPath(name).parts[:-1]}
    assert not folders & {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}
    assert sum(len(document.text) for document in every) > 5_000_000


def test_held_out_files_follow_the_rule() -> None:
    held_out = held_out_documents(RULE)
    small = {one.name: one.text for one in documents("python_stdlib") if len(one.text) <= 16 * 1024}
    in_order = sorted(small, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert [one.name for one in held_out] == in_order[: len(held_out)]
    sizes = [len(one.text) for one in held_out]
    assert sum(sizes[:-1]) < 64 * 1024 <= sum(sizes)
    assert all(small[one.name] == one.text for one in held_out)
