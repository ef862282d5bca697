"""The store of states that were read."""

from __future__ import annotations

import torch

from selective_ssm.generation.prefixes import PrefixStore
from selective_ssm.models import ModelState


def state(number: int) -> ModelState:
    """40 bytes."""
    return ModelState.from_layers([(torch.full((1, 8), float(number)),)], torch.tensor([number]))


def test_the_longest_beginning_is_found() -> None:
    store = PrefixStore(1000)
    for number, digest in enumerate((b"a", b"ab", b"abcd"), 1):
        store.put(digest, state(number))
    found = store.find([b"a", b"ab", b"abx"])
    assert found is not None
    assert (found.length, found.state.position.item()) == (2, 2)
    assert store.find([b"x"]) is None
    assert store.find([]) is None
    assert (store.hits, store.misses) == (1, 2)


def test_the_least_recently_used_goes_first_and_the_bytes_stay_within_bounds() -> None:
    store = PrefixStore(3 * state(0).nbytes)
    for digest in (b"a", b"b", b"c"):
        store.put(digest, state(0))
    store.find([b"a"])
    store.put(b"b", state(0))
    store.put(b"d", state(0))
    assert store.nbytes == store.max_bytes
    assert [store.find([digest]) is not None for digest in (b"a", b"b", b"c", b"d")] == [True, True, False, True]


def test_a_state_larger_than_the_store_displaces_nothing() -> None:
    store = PrefixStore(state(0).nbytes)
    store.put(b"a", state(0))
    store.put(b"large", ModelState.from_layers([(torch.zeros(1, 99),)], torch.tensor([1])))
    assert store.find([b"a"]) is not None
    assert store.find([b"large"]) is None
