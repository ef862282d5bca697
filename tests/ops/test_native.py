from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selective_ssm.ops import native

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture
def library_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path | None], None]]:
    """Put another file, or none, in the place of the CPU library."""

    def replace(path: Path | None) -> None:
        monkeypatch.setattr(native, "_libraries", lambda: [path] if path else [])
        native._loaded.cache_clear()

    yield replace
    native._loaded.cache_clear()


@needs_compiler
def test_the_library_loads_once_and_names_what_it_was_compiled_for() -> None:
    assert native.explain() is None, "run 'make native' first"
    assert native.load() is native.load()
    vectors, threads = native.build().split(", ")
    assert vectors in ("SSE2", "AVX2", "AVX-512", "NEON", "no vector instructions")
    assert threads in ("1 thread of OpenMP", "1 thread of its own")


def test_an_absent_library_is_told(library_is: Callable[[Path | None], None]) -> None:
    library_is(None)
    reason = native.explain()
    assert reason is not None
    assert "was not built at installation: install a C++ compiler" in reason
    with pytest.raises(RuntimeError) as caught:
        native.load()
    assert str(caught.value) == reason


def test_windows_is_told_that_the_reference_serves(
    library_is: Callable[[Path | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    library_is(None)
    monkeypatch.setattr(sys, "platform", "win32")
    assert native.explain() == "there is no CPU library for Windows; the reference backend serves there"


def test_a_damaged_library_is_told(library_is: Callable[[Path | None], None], tmp_path: Path) -> None:
    (tmp_path / "native.so").write_bytes(b"no library")
    library_is(tmp_path / "native.so")
    assert "the CPU library cannot be loaded (" in (native.explain() or "")


@needs_compiler
@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ('extern "C" int selective_ssm_abi_version() { return 999; }', "has interface version 999, but "),
        ('extern "C" int something_else() { return 1; }', "is not the CPU library of selective-ssm"),
    ],
)
def test_another_library_is_told(
    source: str, sentence: str, library_is: Callable[[Path | None], None], tmp_path: Path
) -> None:
    path = tmp_path / "native.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=source, text=True, check=True)
    library_is(path)
    assert sentence in (native.explain() or "")
