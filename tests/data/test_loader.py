from __future__ import annotations

import json
import pickle
import tempfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from selective_ssm.data import Batch, DataConfig, TextBatches, documents, held_out_documents

END = 256
Texts = st.lists(st.binary(min_size=1, max_size=30).map(lambda text: text.hex()), min_size=1, max_size=8)


def config_for(folder: Path, texts: list[str], **fields: object) -> DataConfig:
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return replace(DataConfig(source=str(folder / "lines.jsonl"), cache=str(folder / "cache")), **fields)


def pairs(batches: list[Batch]) -> Counter[tuple[int, int]]:
    """How often each id stands before each target, where there is one."""
    counted: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        counted.update(zip(batch.ids.flatten().tolist(), batch.targets.flatten().tolist(), strict=True))
    return Counter({pair: count for pair, count in counted.items() if pair[1] != -100})


def expected_pairs(texts: list[str]) -> Counter[tuple[int, int]]:
    return Counter(pair for text in texts for pair in pairwise([END, *text.encode(), END]))


def equal(one: Batch, other: Batch) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


@settings(max_examples=25)
@given(Texts, st.integers(1, 20), st.integers(1, 3), st.integers(0, 3))
def test_joined_batches_hold_every_target_once_an_epoch(texts: list[str], length: int, size: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = config_for(Path(folder), texts, row_length=length, batch_size=size, seed=seed)
        batches = TextBatches(config)
        rows = round(batches.batches_per_epoch * size)
        epochs = size  # that many end with a whole batch
        every = [batches[step] for step in range(rows)]
    assert all(batch.ids.shape == batch.targets.shape == (size, length) for batch in every)
    assert pairs(every) == Counter({pair: epochs * count for pair, count in expected_pairs(texts).items()})
    for batch in every:
        followed = batch.targets[:, 1:] != -100
        assert torch.equal(batch.targets[:, :-1][followed], batch.ids[:, 1:][followed])


@settings(max_examples=25)
@given(Texts, st.integers(1, 20), st.integers(1, 3), st.integers(0, 3))
def test_packed_batches_hold_every_target_once_an_epoch(texts: list[str], length: int, size: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = config_for(Path(folder), texts, row_length=length, batch_size=size, seed=seed, packing="packed")
        batches = TextBatches(config)
        every = [batches[step] for step in range(int(batches.batches_per_epoch))]
    assert pairs(every) == expected_pairs(texts)
    for batch in every:
        assert batch.ids.shape == batch.targets.shape == (1, length * size)
        assert batch.cu_seqlens is not None
        assert batch.cu_seqlens.dtype == torch.int32
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == length * size
        for begin, end in pairwise(bounds):
            ids, targets = batch.ids[0, begin:end].tolist(), batch.targets[0, begin:end].tolist()
            if targets[0] == -100:  # the unused end of the row
                assert end == bounds[-1]
                assert set(targets) == {-100}
            else:
                assert end - begin <= length
                assert END not in ids[1:]  # no document begins within a sequence
                assert targets[:-1] == ids[1:]


def test_a_document_is_a_boundary_and_its_ids(tmp_path: Path) -> None:
    batch = TextBatches(config_for(tmp_path, ["abc"], row_length=6, batch_size=1, packing="packed"))[0]
    assert batch.ids.tolist() == [[END, *b"abc", END, END]]
    assert batch.targets.tolist() == [[*b"abc", END, -100, -100]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 4, 6]
    assert batch.ids.dtype == batch.targets.dtype == torch.int64


def test_held_out_documents_are_never_seen(tmp_path: Path) -> None:
    texts = [chr(ord("a") + number) * 10 for number in range(20)]
    config = config_for(tmp_path, texts, row_length=8, batch_size=1, held_out_bytes=50)
    held_out = [document.text.decode() for document in held_out_documents(config)]
    batches = TextBatches(config)
    seen = pairs([batches[step] for step in range(int(batches.batches_per_epoch))])
    assert len(held_out) == 5
    assert seen == expected_pairs([text for text in texts if text not in held_out])
    assert batches.bytes_per_token == pytest.approx(10 / 11)


@pytest.mark.parametrize("packing", ["joined", "packed"])
def test_any_number_of_workers_and_any_start_give_the_same_batches(tmp_path: Path, packing: str) -> None:
    texts = ["x" * length + "y" for length in range(60)]
    batches = TextBatches(config_for(tmp_path, texts, row_length=16, batch_size=4, packing=packing))
    unbroken = [batches[step] for step in range(40)]  # more than an epoch
    assert batches.batches_per_epoch < 40
    for start, workers in ((0, 2), (13, 0), (39, 1)):
        loader = DataLoader(batches, batch_size=None, sampler=range(start, 40), num_workers=workers)
        resumed = list(loader)
        assert len(resumed) == 40 - start
        assert all(map(equal, resumed, unbroken[start:]))


def test_it_pickles_without_its_text(tmp_path: Path) -> None:
    batches = TextBatches(config_for(tmp_path, ["word " * 40_000], row_length=16, batch_size=4))
    step_7 = batches[7]
    pickled = pickle.dumps(batches)
    assert len(pickled) < 10_000
    assert equal(pickle.loads(pickled)[7], step_7)


@pytest.mark.parametrize("packing", ["joined", "packed"])
def test_epochs_and_seeds_differ(tmp_path: Path, packing: str) -> None:
    texts = [f"document number {number}" for number in range(50)]
    config = config_for(tmp_path, texts, row_length=32, batch_size=1, packing=packing)
    batches, other_seed = TextBatches(config), TextBatches(replace(config, seed=1))
    epoch = int(batches.batches_per_epoch)
    first = [batches[step] for step in range(epoch)]
    assert not all(equal(batches[epoch + step], batch) for step, batch in enumerate(first))
    assert not all(equal(other_seed[step], batch) for step, batch in enumerate(first))


def test_identity_tells_apart_what_gives_other_batches(tmp_path: Path) -> None:
    config = config_for(tmp_path, ["one", "two", "three"])
    changes: list[dict[str, object]] = [
        {},
        {"row_length": 7},
        {"batch_size": 2},
        {"packing": "packed"},
        {"seed": 1},
        {"held_out_bytes": 1},
    ]
    identities = [TextBatches(replace(config, **change)).identity for change in changes]
    assert len(set(identities)) == len(changes)
    assert TextBatches(replace(config, cache=str(tmp_path / "other"))).identity == identities[0]
    changed = config_for(tmp_path, ["one", "two", "thr3e"])
    assert TextBatches(changed).identity not in identities


def test_steps_before_the_first_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexError, match="a step must be at least 0, got -1"):
        TextBatches(config_for(tmp_path, ["one"]))[-1]


def test_shakespeare(data: Path, tmp_path: Path) -> None:
    source = data / "tinyshakespeare" / "input.txt"
    batches = TextBatches(DataConfig(source=str(source), row_length=4096, batch_size=1, cache=str(tmp_path)))
    (text,) = (document.text for document in documents(source))
    seen = pairs([batches[step] for step in range(int(batches.batches_per_epoch))])
    assert seen == Counter(pairwise([END, *text, END]))
