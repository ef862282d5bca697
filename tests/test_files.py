from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from selective_ssm import files
from selective_ssm.errors import FileProblem


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a real process that runs a script."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_json_and_tensors_survive_unchanged(tmp_path: Path) -> None:
    files.write_text(tmp_path / "new" / "a.txt", "größer\n")
    assert files.read_text(tmp_path / "new" / "a.txt") == "größer\n"

    data = {"float": 0.1, "nested": [1, None, True, {"é": "ü"}]}
    files.write_json(tmp_path / "a.json", data)
    assert files.read_json(tmp_path / "a.json") == data

    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.int32), "c": torch.zeros(0, 2).bfloat16()}
    files.write_tensors(tmp_path / "a.safetensors", tensors, {"step": "3"})
    again = files.read_tensors(tmp_path / "a.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert all(again[name].dtype == tensors[name].dtype for name in tensors)
    assert files.read_metadata(tmp_path / "a.safetensors") == {"step": "3"}
    assert names(tmp_path) == ["a.json", "a.safetensors", "new"]


def test_every_kind_of_file_is_as_readable_as_others_made_here(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    files.write_json(tmp_path / "a.json", {})
    files.write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> None:
        with files.replacing(tmp_path / "new") as temporary:
            temporary.mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []
    with files.replacing(tmp_path / "new") as temporary:
        files.write_text(temporary / "a.txt", "whole")
        assert names(tmp_path) != ["new"]
    assert (tmp_path / "new" / "a.txt").read_text() == "whole"
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").rmdir()
    assert names(tmp_path) == ["new"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    files.write_text(target, "old")

    def interrupted() -> None:
        with files.replacing(target) as temporary:
            temporary.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


WRITE_AND_WAIT = """
import sys, time
from selective_ssm.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("half", flush=True)
    time.sleep(60)
"""


def test_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    files.write_text(target, "old")
    with python(WRITE_AND_WAIT, target) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"

        # A second writer leaves the first one's temporary file alone as long as it lives …
        files.write_text(target, "second")
        assert len(names(tmp_path)) == 2
        writer.send_signal(signal.SIGKILL)
    assert target.read_text() == "second"
    assert len(names(tmp_path)) == 2

    # … and clears it away afterwards.
    files.write_text(target, "third")
    assert target.read_text() == "third"
    assert names(tmp_path) == ["a.txt"]


def test_a_writer_of_tensors_is_left_alone_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, plain = tmp_path / "a.safetensors", files.save_file
    first, second = ({"w": torch.full((3,), value)} for value in (1.0, 2.0))

    def then_another(*arguments: Any, **keywords: Any) -> None:
        plain(*arguments, **keywords)
        monkeypatch.setattr(files, "save_file", plain)
        files.write_tensors(target, second)
        assert torch.equal(files.read_tensors(target)["w"], second["w"])

    monkeypatch.setattr(files, "save_file", then_another)
    files.write_tensors(target, first)
    assert torch.equal(files.read_tensors(target)["w"], first["w"])
    assert names(tmp_path) == ["a.safetensors"]


KEEP_WRITING = """
import sys, torch
from selective_ssm import files
for count in range(150):
    files.write_tensors(sys.argv[1], {"w": torch.full((64,), float(count))})
"""


def test_writers_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    for process in [python(KEEP_WRITING, target), python(KEEP_WRITING, target)]:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert torch.equal(files.read_tensors(target)["w"], torch.full((64,), 149.0))
    assert names(tmp_path) == ["a.safetensors"]


def test_a_full_disk_is_told_and_leaves_the_old_file(small_disk: Path) -> None:
    text, weights = small_disk / "a.txt", small_disk / "a.safetensors"
    files.write_text(text, "old")
    files.write_tensors(weights, {"w": torch.ones(3)})
    with pytest.raises(FileProblem, match=r"cannot write '.*a.txt': the disk is full; free some space"):
        files.write_text(text, "x" * 2**20)
    with pytest.raises(FileProblem, match=r"cannot write '.*a.safetensors': the disk is full; free some space"):
        files.write_tensors(weights, {"w": torch.ones(2**18)})
    assert text.read_text() == "old"
    assert torch.equal(files.read_tensors(weights)["w"], torch.ones(3))
    assert names(small_disk) == ["a.safetensors", "a.txt"]


LIMITED_WRITE = """
import resource, sys
import torch
from selective_ssm import files
from selective_ssm.errors import FileProblem
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
for write in (
    lambda: files.write_text(sys.argv[1], "x" * 2**20),
    lambda: files.write_tensors(sys.argv[1], {"w": torch.ones(2**18)}),
):
    try:
        write()
    except FileProblem as problem:
        print(problem)
"""


def test_a_limit_on_the_size_of_files_is_told_and_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    files.write_text(target, "old")
    printed, errors = python(LIMITED_WRITE, target).communicate(timeout=60)
    assert printed.count("would grow beyond the size allowed here") == 2, errors
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """Root may write everywhere, so for such a test it becomes nobody."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_an_unwritable_folder_is_told(ordinary_user: None) -> None:
    with pytest.raises(FileProblem, match=r"cannot write '/a\.txt': (permission is denied|the disk is read-only)"):
        files.write_text("/a.txt", "text")


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileProblem, match="a part of this path is a file, not a folder"):
        files.write_text(tmp_path / "file" / "a.txt", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileProblem, match="this is a folder, not a file"):
        files.write_text(tmp_path / "folder", "text")
    assert names(tmp_path) == ["file", "folder"]


READERS = {"text": files.read_text, "json": files.read_json, "tensors": files.read_tensors}


@pytest.mark.parametrize("reader", READERS)
def test_a_missing_file_is_told(reader: str, tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match=r"cannot read '.*none': there is no such file"):
        READERS[reader](tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"  \n", b'{"a": ', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FileProblem, match=r"a\.json' is"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_truncated_tensors_are_told(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    files.write_tensors(path, {"w": torch.ones(64)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FileProblem, match=r"a\.safetensors' is (empty|not a whole safetensors file)"):
        files.read_tensors(path)


def test_foreign_tensors_are_told(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(FileProblem, match="not a whole safetensors file"):
        files.read_tensors(tmp_path / "a.safetensors")


COUNT_UP = """
import sys, time
from pathlib import Path
from selective_ssm.files import locked
counter = Path(sys.argv[1])
for _ in range(50):
    with locked(counter):
        count = int(counter.read_text())
        time.sleep(0.001)
        counter.write_text(str(count + 1))
"""


def test_two_processes_take_turns(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    for process in [python(COUNT_UP, counter), python(COUNT_UP, counter)]:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert counter.read_text() == "100"


HOLD = """
import sys, time
from selective_ssm.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_free_again_when_its_holder_is_killed(tmp_path: Path) -> None:
    with python(HOLD, tmp_path / "cache") as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        taken = threading.Event()

        def take() -> None:
            with files.locked(tmp_path / "cache"):
                taken.set()

        threading.Thread(target=take, daemon=True).start()
        assert not taken.wait(0.1)
        holder.send_signal(signal.SIGKILL)
        assert taken.wait(10)


OWN = """
import sys, time
from selective_ssm.files import owned
with owned(sys.argv[1], taken="busy"):
    print("owned", flush=True)
    time.sleep(60)
"""


def test_what_a_process_owns_is_refused_to_others_until_it_ends(tmp_path: Path) -> None:
    with python(OWN, tmp_path / "a") as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        with pytest.raises(FileProblem, match=r"^busy$"), files.owned(tmp_path / "a", taken="busy"):
            pass
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)
    with files.owned(tmp_path / "a", taken="busy"):
        pass


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    contents = [{"n": n, "filler": "x" * 50_000} for n in range(2)]
    files.write_json(target, contents[0])
    until = time.monotonic() + 0.3

    def write() -> None:
        while time.monotonic() < until:
            for content in contents:
                files.write_json(target, content)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        assert json.loads(target.read_text()) in contents
    writer.join()
