"""The cache of compiled kernels; doubles play the compiler and the driver."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from selective_ssm.ops import cubin_cache, nvrtc
from tests.ops.kernel_doubles import ADD, DEFINES, Driver, compiled, double, fresh, source

__all__ = ["compiled", "double", "fresh", "source"]


@pytest.mark.usefixtures("double")
def test_a_kernel_is_made_once_and_compiled_once(
    source: Path, fresh: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = [threading.Thread(target=nvrtc.kernel, args=(source, "add", DEFINES, 0)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nvrtc.kernel(source, "add", DEFINES, 0) is nvrtc.kernel(source, "add", DEFINES, 0)
    assert compiled == ["sm_90"]
    (entry,) = fresh.iterdir()
    assert entry.suffix == ".cubin"
    monkeypatch.setattr(nvrtc, "_kernels", {})  # as in another process
    nvrtc.kernel(source, "add", DEFINES, 0)
    assert compiled == ["sm_90"]


@pytest.mark.usefixtures("double")
def test_whatever_a_cubin_depends_on_has_an_entry_of_its_own(
    source: Path, fresh: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def entries() -> int:
        monkeypatch.setattr(nvrtc, "_kernels", {})
        nvrtc.kernel(source, "add", DEFINES, 0)
        return len(list(fresh.iterdir()))

    assert entries() == 1
    nvrtc.kernel(source, "add", (("FACTOR", 3),), 0)
    assert entries() == 2
    monkeypatch.setattr(nvrtc, "_arch", lambda device: "sm_80")
    assert entries() == 3
    monkeypatch.setattr(nvrtc, "_nvrtc_version", lambda: (13, 1))
    assert entries() == 4
    source.write_text(ADD + "\n")
    assert entries() == 5
    header = source.with_name("device.cuh")  # found before ours
    header.write_text("typedef long long int64;\n")
    assert entries() == 6
    assert len(compiled) == 6


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: whole[:-1] + b"?", lambda whole: b""])
@pytest.mark.usefixtures("double")
def test_a_damaged_entry_is_rebuilt(
    source: Path,
    fresh: Path,
    compiled: list[str],
    damage: Callable[[bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvrtc.kernel(source, "add", DEFINES, 0)
    (entry,) = fresh.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    monkeypatch.setattr(nvrtc, "_kernels", {})
    nvrtc.kernel(source, "add", DEFINES, 0)
    assert len(compiled) == 2
    assert entry.read_bytes() == whole


@pytest.mark.usefixtures("double")
def test_an_entry_under_the_name_of_another_is_rebuilt(source: Path, fresh: Path, compiled: list[str]) -> None:
    nvrtc.kernel(source, "add", DEFINES, 0)
    (entry,) = fresh.iterdir()
    other = entry.with_name("0" * 64 + ".cubin")
    entry.rename(other)
    assert cubin_cache.read(other) is None


def test_an_entry_that_the_driver_refuses_is_rebuilt(
    source: Path, compiled: list[str], double: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvrtc.kernel(source, "add", DEFINES, 0)
    monkeypatch.setattr(nvrtc, "_kernels", {})
    double.refused["cuModuleLoadData"] = [200]
    nvrtc.kernel(source, "add", DEFINES, 0)
    assert len(compiled) == 2
    monkeypatch.setattr(nvrtc, "_kernels", {})
    double.refused["cuModuleLoadData"] = [200, 200]
    with pytest.raises(RuntimeError, match=re.escape("kernel 'add' cannot be loaded: invalid argument (CUDA_ERROR_")):
        nvrtc.kernel(source, "add", DEFINES, 0)


@pytest.mark.usefixtures("double")
def test_an_unwritable_folder_is_told_once(source: Path, fresh: Path, compiled: list[str]) -> None:
    fresh.write_text("a file, where a folder is wanted")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nvrtc.kernel(source, "add", DEFINES, 0)
        nvrtc.kernel(source, "add", (("FACTOR", 3),), 0)
    (warning,) = caught
    assert "compiled kernels are not kept, so every process compiles them again" in str(warning.message)
    assert "a part of this path is a file" in str(warning.message)
    assert len(compiled) == 2
    nvrtc.kernel(source, "other", DEFINES, 0)  # of the same source, which is in memory
    assert len(compiled) == 2


@pytest.mark.usefixtures("double")
def test_a_user_without_a_home_is_told(
    source: Path, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SELECTIVE_SSM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cubin_cache.os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match="this user has no home folder"):
        nvrtc.kernel(source, "add", DEFINES, 0)
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("platform", "variables", "folder"),
    [
        ("linux", {"SELECTIVE_SSM_CACHE": "/chosen", "XDG_CACHE_HOME": "/xdg"}, "/chosen"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/selective-ssm/kernels"),
        ("linux", {}, "/home/me/.cache/selective-ssm/kernels"),
        ("darwin", {}, "/home/me/Library/Caches/selective-ssm/kernels"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/selective-ssm/kernels"),
    ],
)
def test_the_folder_can_be_chosen(
    platform: str, variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SELECTIVE_SSM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cubin_cache.sys, "platform", platform)
    assert cubin_cache.entry("key").parent == Path(folder)


WRITER = """
import sys
from pathlib import Path
from selective_ssm.ops import cubin_cache

print("ready", flush=True)
sys.stdin.readline()
for i in range(30):
    path = cubin_cache.entry(i % 3)
    cubin = bytes([i % 3]) * 100_000
    found = cubin_cache.read(path)
    assert found in (None, cubin)
    cubin_cache.keep(path, cubin)
    assert cubin_cache.read(path) == cubin
"""


def test_two_processes_at_once_are_safe(fresh: Path) -> None:
    command, pipe = [sys.executable, "-W", "error", "-c", WRITER], subprocess.PIPE
    writers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    for writer in writers:
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    assert len(list(fresh.iterdir())) == 3
