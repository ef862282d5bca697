"""States of texts that were read, kept for others that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from selective_ssm.models import ModelState


class Found(NamedTuple):
    """What is known of a text: the state after its first `length` tokens."""

    length: int
    state: ModelState


class PrefixStore:
    """States of one slot by the digest of what they have read; the least recently used go first.

    Args:
        max_bytes: of all states together.

    Attributes:
        hits: how often a beginning of a text was there.
        misses: how often none was.

    Example:
        >>> import torch
        >>> store = PrefixStore(max_bytes=100)
        >>> store.put(b"one", ModelState.from_layers([(torch.ones(1, 4),)], torch.tensor([1])))
        >>> store.find([b"one", b"one two"]).length, store.find([b"two"]), store.hits, store.misses
        (1, None, 1, 1)
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        self._reader: object = None
        self._states: OrderedDict[bytes, ModelState] = OrderedDict()

    def keep_those_of(self, reader: object) -> None:
        """Let go of all states, unless they are of an equal reader: of the weights that will read on."""
        if reader != self._reader:
            self._states.clear()
            self.nbytes = 0
            self._reader = reader

    def put(self, digest: bytes, state: ModelState) -> None:
        """Keep a state, unless it is larger than the store."""
        if digest in self._states:
            self._states.move_to_end(digest)
            return
        if state.nbytes > self.max_bytes:
            return
        self._states[digest] = state
        self.nbytes += state.nbytes
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._states.popitem(last=False)[1].nbytes

    def find(self, digests: Sequence[bytes]) -> Found | None:
        """The state of the longest beginning of a text that is here.

        Args:
            digests: after its first token, its second, and so on.
        """
        for length in range(len(digests), 0, -1):
            if (state := self._states.get(digests[length - 1])) is not None:
                self._states.move_to_end(digests[length - 1])
                self.hits += 1
                return Found(length, state)
        self.misses += 1
        return None
