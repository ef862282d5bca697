"""A checkpoint is a folder, or a name on the hub, of which the cache may hold a copy."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from selective_ssm.data import ByteTokenizer
from selective_ssm.errors import FileProblem, MissingPackage
from selective_ssm.generation import load
from selective_ssm.models import LanguageModel, LanguageModelConfig
from selective_ssm.models.hub import located

NAME = "someone/tiny-mamba"
MODEL = LanguageModelConfig(d_model=8, n_layer=1, vocab_size=257)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's own cache, empty, with no network to fill it from."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def keep(cache: Path, model_type: str) -> Path:
    """Put a model into the cache, as the package lays one out."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / f"models--{NAME.replace('/', '--')}"
    folder = repository / "snapshots" / revision
    LanguageModel(MODEL).save_pretrained(folder, model_type=model_type)
    ByteTokenizer().save(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    return folder


@pytest.mark.parametrize("model_type", ["selective_ssm", "mamba", "state-spaces"])
def test_a_model_is_taken_from_the_cache(cache: Path, model_type: str) -> None:
    folder = keep(cache, model_type)
    assert located(NAME) == folder
    model, tokenizer = load(NAME)
    assert model.config.d_model == 8
    assert tokenizer is not None
    assert LanguageModel.from_pretrained(NAME).config == model.config


def test_a_folder_that_is_here_wins(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(cache, "mamba")
    monkeypatch.chdir(tmp_path)
    LanguageModel(MODEL).save_pretrained(NAME)
    assert located(NAME) == Path(NAME)
    shutil.rmtree(NAME)
    assert located(NAME) != Path(NAME)
    assert located(Path(NAME)) == Path(NAME), "a Path is never a name"


@pytest.mark.parametrize("path", ["none", "runs/first/last", "/none/model", "./none", "~/none"])
def test_a_path_is_not_asked_for(cache: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert located(path) == Path(path)


def test_offline_one_sentence_tells(cache: Path) -> None:
    with pytest.raises(FileProblem) as told:
        LanguageModel.from_pretrained(NAME)
    assert str(told.value) == (
        f"there is no folder '{NAME}', and the Hugging Face hub cannot be reached from here for a model of that name, "
        "which its cache lacks"
    )


def refusal(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    """What the package raises for an answer of the hub's."""
    error = kind.__new__(kind)
    Exception.__init__(error, "402 Client Error\nand more")
    return error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (refusal(RepositoryNotFoundError), "has no model of that name, or a private one"),
        (refusal(GatedRepoError), "is for those who asked for it: run 'hf auth login'"),
        (refusal(HfHubHTTPError), "gave no model of that name"),
        (OSError("the disk is full"), "gave no model of that name: the disk is full$"),
    ],
)
def test_what_the_hub_refuses_is_told(
    error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileProblem, match=f"no folder '{NAME}', and .*{sentence}"):
        located(NAME)


def test_pickles_are_fetched_only_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "model.safetensors").touch()
    located(NAME)
    assert len(asked) == 1
    assert not any("bin" in pattern for pattern in asked[0])
    (tmp_path / "model.safetensors").unlink()
    located(NAME)
    assert len(asked) == 3
    assert "pytorch_model*.bin" in asked[2]


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackage, match=rf"no folder '{NAME}'; if .*: pip install 'selective-ssm\[hub\]'"):
        located(NAME)
