from __future__ import annotations

import gzip
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from selective_ssm.data import Document, describe_source, documents
from selective_ssm.errors import FileProblem, MissingPackage, UserError

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
UNDECODABLE = b"caf\xe9 \xff\x00 \xf0\x9d\x84\x9e\r\n"


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_plain_file_is_one_document_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(PACKERS[suffix](UNDECODABLE))
    assert list(documents(path)) == [Document(path.name, UNDECODABLE)]


@pytest.mark.parametrize("suffix", PACKERS)
def test_each_json_line_is_a_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"lines.jsonl{suffix}"
    lines = [b'\xef\xbb\xbf{"text": "one"}\r', b"", b'{"id": 7, "text": ""}', b'{"text": "caf\xe9 \\u00e9 \xc3\xa9"}']
    path.write_bytes(PACKERS[suffix](b"\n".join(lines)))
    assert list(documents(path)) == [
        Document(f"{path.name}:1", b"one"),
        Document(f"{path.name}:4", b"caf\xe9 \xc3\xa9 \xc3\xa9"),
    ]


@pytest.mark.parametrize("suffix", PACKERS)
def test_capitals_in_an_ending_do_not_matter(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"LINES.JSONL{suffix.upper()}"
    path.write_bytes(PACKERS[suffix](b'{"text": "one"}'))
    assert list(documents(path)) == [Document(f"{path.name}:1", b"one")]


def test_another_field_may_hold_the_text_and_lone_surrogates_survive(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps({"body": "a\ud800b"}))
    assert list(documents(path, text_field="body")) == [Document("lines.jsonl:1", b"a\xed\xa0\x80b")]


def test_a_folder_is_read_recursively_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.md", "a.txt", ".hidden", ".git/config", "empty.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else name)
    assert [document.name for document in documents(tmp_path)] == ["a.txt", "a/b/c.md", "a/z.txt", "b.txt"]


def test_a_glob_names_documents_by_what_its_fixed_part_leaves(tmp_path: Path) -> None:
    for name in ("books/b.txt", "books/old/a.txt", "books/c.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    assert [document.name for document in documents(tmp_path / "books/**/*.txt")] == ["b.txt", "old/a.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("text")
    assert [document.name for document in documents(tmp_path / "a[1].txt")] == ["a[1].txt"]


def test_documents_are_read_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"text": "good"}\nbad\n')
    opened = documents(tmp_path / "lines.jsonl")
    assert next(opened).text == b"good"
    with pytest.raises(UserError, match=r"lines.jsonl:2 is not a JSON line"):
        next(opened)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": "cut', "3 is not a JSON line"),
        ("[" * 100_000, "3 is not a JSON line"),
        ('["text"]', "3 must be a JSON object with a field 'text', got list"),
        ('{"texts": ""}', "3 has no field 'text' (did you mean 'texts'?): set the text field to"),
        ('{"text": 1}', "the field 'text' of"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(UserError) as caught:
        list(documents(path))
    assert sentence in str(caught.value)
    assert f"{path}:3" in str(caught.value)


def test_an_absent_source_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("text")
    with pytest.raises(FileProblem, match=r"no file or folder '.*shakespear.txt' \(did you mean 'shakespeare.txt'\?\)"):
        list(documents(tmp_path / "shakespear.txt"))
    with pytest.raises(FileProblem, match=r"did you mean 'python_stdlib'\?"):
        list(documents("python-stdlib"))
    with pytest.raises(FileProblem, match=r"nothing to read in '.*\*\.md': the pattern matches no file"):
        list(documents(tmp_path / "*.md"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileProblem, match="the folder has no file"):
        list(documents(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.txt.gz"])
def test_a_source_without_any_text_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="holds no text at all"):
        list(documents(tmp_path / name))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["text.txt", "lines.jsonl"])
def test_a_truncated_archive_is_refused(tmp_path: Path, name: str, suffix: str) -> None:
    lines = b"".join(b'{"text": "%s"}\n' % os.urandom(8).hex().encode() for _ in range(1000))
    (tmp_path / f"{name}{suffix}").write_bytes(PACKERS[suffix](lines)[:-100])
    with pytest.raises(FileProblem, match=f"'.*{name}{suffix}' is truncated or no {suffix} file"):
        list(documents(tmp_path))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_what_is_no_archive_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"text{suffix}").write_bytes(b"plain words, nothing packed")
    with pytest.raises(FileProblem, match=f"text{suffix}'"):
        list(documents(tmp_path))


def test_an_archive_of_several_zstd_frames_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "text.zst").write_bytes(PACKERS[".zst"](b"one ") + PACKERS[".zst"](b"two"))
    assert [document.text for document in documents(tmp_path)] == [b"one two"]


def test_zstd_is_asked_for_when_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.zst").write_bytes(PACKERS[".zst"](b"text"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingPackage, match=r"pip install 'selective-ssm\[zstd\]'"):
        list(documents(tmp_path))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may read every file")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("text")
    (tmp_path / "secret.txt").chmod(0)
    with pytest.raises(FileProblem, match="permission is denied"):
        list(documents(tmp_path / "secret.txt"))


def test_sources_in_words() -> None:
    assert describe_source("python_stdlib").startswith("the standard library of CPython 3.")
    assert describe_source("books/*.txt") == "books/*.txt"


def test_english_novels(data: Path) -> None:
    archive = data / "english_novels" / "english_novels.jsonl.xz"
    sizes = [len(document.text) for document in documents(archive)]
    assert len(sizes) == 94
    assert sum(sizes) == 68_462_251 + 2_409_827 + 2_584_308
