"""A bookmark on disk: a text goes on from it as if it had never stopped, and with its own model only."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from selective_ssm import files
from selective_ssm.errors import FileProblem, UserError
from selective_ssm.generation import Bookmark, generate, load_state, save_state
from selective_ssm.models import LanguageModel, LanguageModelConfig

PROMPT = [5, 6, 7, 200]
WISHES = {"temperature": 0.9, "top_k": 40}
DTYPES = ("float32", "bfloat16")

GO_ON = """
import json, sys, torch
from selective_ssm.generation import generate, load_state
from selective_ssm.models import LanguageModel

torch.set_num_threads(1)
answers = {}
for dtype in sys.argv[2:]:
    model = LanguageModel.from_pretrained(sys.argv[1], dtype=getattr(torch, dtype)).eval()
    state = load_state(f"{sys.argv[1]}/{dtype}", model)
    (rest,) = generate(model, [[]], state=state, max_new_tokens=30, logprobs=True, temperature=0.9, top_k=40)
    answers[dtype] = [rest.ids, rest.logprobs, rest.prompt_tokens]
print(json.dumps(answers))
"""


def tiny(**changes: int) -> LanguageModel:
    torch.manual_seed(3)
    return LanguageModel(LanguageModelConfig(**{"d_model": 16, "n_layer": 2, "vocab_size": 257} | changes)).eval()


def bookmark_of(model: LanguageModel) -> Bookmark:
    bookmark = generate(model, PROMPT, max_new_tokens=6, keep_state=True, seed=11)[0].state
    assert bookmark is not None
    return bookmark


def relabelled(path: Path, **changes: str | None) -> None:
    """Write a state file anew with other metadata."""
    metadata: Mapping[str, str | None] = files.read_metadata(path) | changes
    kept = {name: text for name, text in metadata.items() if text is not None}
    files.write_tensors(path, files.read_tensors(path), kept)


@pytest.fixture
def model() -> LanguageModel:
    return tiny()


@pytest.fixture
def saved(tmp_path: Path, model: LanguageModel) -> Path:
    path = tmp_path / "book.safetensors"
    save_state(path, bookmark_of(model), model)
    return path


def test_another_process_goes_on_as_if_nothing_had_been(tmp_path: Path, model: LanguageModel) -> None:
    model.save_pretrained(tmp_path)
    whole = {}
    for dtype in DTYPES:
        own = LanguageModel.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).eval()
        (unbroken,) = generate(own, PROMPT, max_new_tokens=50, logprobs=True, seed=11, **WISHES)
        (first,) = generate(own, PROMPT, max_new_tokens=20, keep_state=True, seed=11, **WISHES)
        assert first.state is not None
        assert unbroken.logprobs is not None
        save_state(tmp_path / dtype, first.state, own)
        assert first.ids == unbroken.ids[:20]
        whole[dtype] = [unbroken.ids[20:], unbroken.logprobs[20:], len(PROMPT) + 20]
    command = [sys.executable, "-c", GO_ON, str(tmp_path), *DTYPES]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == whole


def test_what_is_read_is_what_was_written(saved: Path, model: LanguageModel) -> None:
    written, read = bookmark_of(model), load_state(saved, model)
    assert (read.pending, read.digest, read.seed) == (written.pending, written.digest, written.seed)
    assert read.state.tensors().keys() == written.state.tensors().keys()
    for name, tensor in written.state.tensors().items():
        assert torch.equal(read.state.tensors()[name], tensor)
    assert read.state.layers[0][0].data_ptr() == read.state.tensors()["float32"].data_ptr(), "the layers are views"


def test_another_model_is_refused(saved: Path, model: LanguageModel) -> None:
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight[3, 2].nextafter_(torch.tensor(9.0))
    with pytest.raises(
        UserError, match="of another model: its weights were others, though the configuration is the same"
    ):
        load_state(saved, model)
    with pytest.raises(
        UserError, match="its weights were in float32, those of this one are in bfloat16; load it in the"
    ):
        load_state(saved, tiny().bfloat16())
    with pytest.raises(UserError, match="of another model: its n_layer is 2, that of this one is 3"):
        load_state(saved, tiny(n_layer=3))
    with pytest.raises(UserError, match="the bookmark's state is of another model: it has float32 float32"):
        save_state(saved, bookmark_of(model), tiny(d_model=32))


def test_what_is_no_state_is_refused(saved: Path, model: LanguageModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(FileProblem, match=r"model\.safetensors' holds no state: name a file that save_state"):
        load_state(tmp_path / "model.safetensors", model)
    with pytest.raises(FileProblem, match="is not a whole safetensors file"):
        load_state(tmp_path / "config.json", model)
    with pytest.raises(FileProblem, match="there is no such file"):
        load_state(tmp_path / "none", model)
    saved.write_bytes(saved.read_bytes()[:-10])
    with pytest.raises(FileProblem, match="truncated"):
        load_state(saved, model)


def test_a_newer_format_is_refused(saved: Path, model: LanguageModel) -> None:
    relabelled(saved, format="2")
    with pytest.raises(FileProblem, match="is a state of the format 2, this version of selective-ssm reads 1"):
        load_state(saved, model)


@pytest.mark.parametrize("key", ["config", "dtype", "weights", "state", "pending", "digest", "seed"])
def test_damaged_metadata_is_refused(key: str, saved: Path, model: LanguageModel) -> None:
    relabelled(saved, **{key: None})
    with pytest.raises(FileProblem, match=f"is damaged: .*'{key}'"):
        load_state(saved, model)


@pytest.mark.parametrize(
    "changes",
    [{"config": "{"}, {"config": "3"}, {"config": '{"kind": "mlp"}'}, {"pending": "x"}, {"digest": "0g"}, {"seed": ""}],
    ids=str,
)
def test_metadata_that_says_nothing_is_refused(changes: dict[str, str], saved: Path, model: LanguageModel) -> None:
    relabelled(saved, **changes)
    with pytest.raises(FileProblem, match="is damaged: what it says of the state cannot be read"):
        load_state(saved, model)


def test_a_state_with_one_bit_changed_is_refused(saved: Path, model: LanguageModel) -> None:
    content = bytearray(saved.read_bytes())
    content[-5] ^= 1
    saved.write_bytes(content)
    with pytest.raises(FileProblem, match="is damaged: its numbers are not those that were written"):
        load_state(saved, model)


@pytest.mark.parametrize("change", ["missing", "shape", "dtype"])
def test_tensors_that_do_not_fit_are_refused(change: str, saved: Path, model: LanguageModel) -> None:
    tensors = files.read_tensors(saved)
    content = tensors.pop("float32")
    if change != "missing":
        tensors["float32"] = content[:, 1:].contiguous() if change == "shape" else content.double()
    files.write_tensors(saved, tensors, files.read_metadata(saved))
    with pytest.raises(FileProblem, match="is damaged: it has .*, expected float32 float32"):
        load_state(saved, model)
