"""Where figures come from."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from selective_ssm.bench import versions


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Git in a new repository, in which the module seems to lie."""
    monkeypatch.delenv("SELECTIVE_SSM_COMMIT", raising=False)
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "versions.py"))

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=b", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    return git


def test_the_commit_is_that_of_the_checkout(repository: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "versions.py").write_text("first")
    repository("add", "versions.py")
    repository("commit", "-m", "first")
    head = repository("rev-parse", "--short=12", "HEAD")
    assert versions.commit() == head
    (tmp_path / "versions.py").write_text("changed")
    assert versions.commit() == f"{head}-dirty"


def test_a_repository_that_does_not_keep_this_file_is_not_asked(
    repository: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the package is installed inside another project's checkout."""
    repository("commit", "--allow-empty", "-m", "theirs")
    assert versions.commit() is None
    monkeypatch.setenv("SELECTIVE_SSM_COMMIT", "named")
    assert versions.commit() == "named"


def test_versions_are_those_installed() -> None:
    found = versions.versions()
    assert found["torch"]
    assert versions.version("no-such-package") is None
