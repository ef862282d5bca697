from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from selective_ssm.ops import native

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@needs_compiler
@pytest.mark.skipif("SELECTIVE_SSM_LIBRARY" in os.environ, reason="SELECTIVE_SSM_LIBRARY names another library")
def test_the_library_loads_once_and_names_what_it_was_compiled_for() -> None:
    assert native.explain() is None, "run 'make native' first"
    assert native.load() is native.load()
    vectors, threads = native.build().split(", ")
    assert vectors in ("SSE2", "AVX2", "AVX-512", "NEON", "no vector instructions")
    assert threads in ("1 thread of OpenMP", "1 thread of its own")


@needs_compiler
def test_a_kernel_is_of_the_instruction_set_that_was_asked_for(vectors: str) -> None:
    assert native.vectors() == vectors
    assert native.function("apply").__name__ == f"selective_ssm_apply_{vectors}"
    assert native.function("apply") is native.function("apply")


@needs_compiler
@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (
            "avx51",
            r"SELECTIVE_SSM_VECTORS is 'avx51', which does not exist \(did you mean 'avx512'\?\); expected one of ",
        ),
        ("avx512", "SELECTIVE_SSM_VECTORS is 'avx512', but of its instruction sets this machine has 'baseline'$"),
    ],
)
def test_an_instruction_set_that_is_not_there_is_refused(
    wanted: str, sentence: str, forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "available", lambda: ["baseline"])
    monkeypatch.setenv("SELECTIVE_SSM_VECTORS", wanted)
    forget()
    with pytest.raises(ValueError, match=sentence):
        native.vectors()


def test_few_numbers_are_worth_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert native.threads(5120 * 16) == 1, "one token of the largest preset"
    assert native.threads(1 << 20) == 7


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
