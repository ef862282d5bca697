from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from selective_ssm.data import ByteTokenizer, DataConfig
from selective_ssm.data.cache import cached_tokens
from selective_ssm.errors import FileProblem, UserError

DOCUMENTS = {"a.txt": b"one", "b.txt": b"\xff\x00", "c.txt": b"three"}
STREAM = [256, *b"one", 256, *b"\xff\x00", 256, *b"three", 256]

# Opens the cache given on the command line with a tokenizer that tells each document it is given, and waits after the
# first one until the file "go" appears.
PROCESS = """
import sys, time
from pathlib import Path
from selective_ssm.data import ByteTokenizer, DataConfig
from selective_ssm.data.cache import cached_tokens

source, cache, go = sys.argv[1:]

class Told(ByteTokenizer):
    def encode(self, text):
        print("encodes", flush=True)
        while not Path(go).exists():
            time.sleep(0.01)
        return super().encode(text)

print("begins", flush=True)
print("has", cached_tokens(DataConfig(source=source, cache=cache), Told()).ids.tolist(), flush=True)
"""


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "source").mkdir()
    for name, text in DOCUMENTS.items():
        (tmp_path / "source" / name).write_bytes(text)
    return DataConfig(source=str(tmp_path / "source"), cache=str(tmp_path / "cache"))


class Counting(ByteTokenizer):
    """Counts the documents that it is given."""

    encoded = 0

    def encode(self, text: str | bytes) -> list[int]:
        self.encoded += 1
        return super().encode(text)


def files(config: DataConfig, suffix: str) -> list[Path]:
    return sorted(Path(config.cache or "").glob(f"*{suffix}"))


def test_documents_lie_in_one_stream_between_boundaries(config: DataConfig) -> None:
    tokens = cached_tokens(config, ByteTokenizer())
    assert tokens.ids.tolist() == STREAM
    assert tokens.ids.dtype == np.uint16
    assert tokens.bounds.tolist() == [0, 4, 7, 13]
    assert tokens.n_bytes.tolist() == [3, 2, 5]


def test_large_vocabularies_take_four_bytes(config: DataConfig) -> None:
    class Large(ByteTokenizer):
        vocab_size = 70_000
        end = 69_999
        identity = "large"

    assert cached_tokens(config, Large()).ids[[0, 1, -1]].tolist() == [69_999, ord("o"), 69_999]


def test_the_second_time_nothing_is_encoded(config: DataConfig) -> None:
    tokenizer = Counting()
    first, second = cached_tokens(config, tokenizer), cached_tokens(config, tokenizer)
    assert tokenizer.encoded == 3
    assert (first.path, first.checksum) == (second.path, second.checksum)


def test_splitting_and_cutting_do_not_matter(config: DataConfig) -> None:
    tokenizer = Counting()
    cached_tokens(config, tokenizer)
    other = DataConfig(source=config.source, cache=config.cache, held_out_bytes=3, packing="packed", row_length=7)
    cached_tokens(other, tokenizer)
    assert tokenizer.encoded == 3


def test_a_changed_source_is_encoded_anew(config: DataConfig) -> None:
    cached_tokens(config, ByteTokenizer())
    changed = Path(config.source, "a.txt")
    changed.write_bytes(b"new")
    os.utime(changed, ns=(0, 0))
    assert bytes(cached_tokens(config, ByteTokenizer()).ids[1:4].astype(np.uint8)) == b"new"


def test_a_source_that_changes_meanwhile_is_refused(config: DataConfig) -> None:
    class Changing(ByteTokenizer):
        def encode(self, text: str | bytes) -> list[int]:
            Path(config.source, "c.txt").write_text("longer than before")
            return super().encode(text)

    with pytest.raises(UserError, match="changed while it was read"):
        cached_tokens(config, Changing())
    assert not files(config, ".npz")


@pytest.mark.parametrize("suffix", [".uint16", ".npz"])
@pytest.mark.parametrize("damage", ["removed", "empty", "truncated", "overwritten"])
def test_a_damaged_file_is_made_anew(config: DataConfig, suffix: str, damage: str) -> None:
    cached_tokens(config, ByteTokenizer())
    (path,) = files(config, suffix)
    whole = path.read_bytes()
    damaged = {"empty": b"", "truncated": whole[:-2], "overwritten": bytes(len(whole))}
    path.unlink()
    if damage != "removed":
        path.write_bytes(damaged[damage])
    tokenizer = Counting()
    assert cached_tokens(config, tokenizer).ids.tolist() == STREAM
    assert tokenizer.encoded == 3
    assert files(config, suffix) == [path]


def test_an_unusable_folder_is_told_in_words(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = DataConfig(source=config.source, cache=str(tmp_path / "file" / "cache"))
    with pytest.raises(FileProblem, match="a part of this path is a file"):
        cached_tokens(blocked, ByteTokenizer())


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"SELECTIVE_SSM_CACHE": "chosen", "XDG_CACHE_HOME": "xdg"}, "chosen"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/selective-ssm/tokens"),
        ({}, ".cache/selective-ssm/tokens"),
    ],
)
def test_the_folder_can_be_chosen(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("SELECTIVE_SSM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    tokens = cached_tokens(DataConfig(source=config.source), ByteTokenizer())
    assert tokens.path.parent == tmp_path / folder


def start(config: DataConfig, go: Path) -> subprocess.Popen[str]:
    """Start a process that wants the cache."""
    command = [sys.executable, "-c", PROCESS, config.source, config.cache or "", str(go)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def next_word(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def last_words(process: subprocess.Popen[str]) -> list[str]:
    """What a process still says until it ends."""
    with process:
        assert process.stdout
        return process.stdout.read().splitlines()


def test_of_two_processes_one_encodes_and_both_have_all(config: DataConfig, tmp_path: Path) -> None:
    processes = [start(config, tmp_path / "go") for _ in range(2)]
    assert [next_word(process) for process in processes] == ["begins"] * 2
    time.sleep(0.2)  # both are in the midst of it now: one encodes, the other waits for the lock
    (tmp_path / "go").touch()
    told = sorted((last_words(process) for process in processes), key=len)
    assert told == [[f"has {STREAM}"], [*["encodes"] * 3, f"has {STREAM}"]]


def test_nothing_half_made_is_used_when_the_builder_is_killed(config: DataConfig, tmp_path: Path) -> None:
    builder = start(config, tmp_path / "go")
    assert [next_word(builder), next_word(builder)] == ["begins", "encodes"]
    assert files(config, ".tmp")
    waiting = start(config, tmp_path / "go")
    assert next_word(waiting) == "begins"
    builder.kill()
    assert last_words(builder) == []
    assert not files(config, ".npz")
    (tmp_path / "go").touch()
    assert last_words(waiting) == [*["encodes"] * 3, f"has {STREAM}"]
    assert not files(config, ".tmp")
    assert cached_tokens(config, Counting()).ids.tolist() == STREAM
