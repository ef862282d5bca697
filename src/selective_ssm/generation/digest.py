"""A text's hash, which grows with the text: one digest for every beginning of it."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from itertools import accumulate

START = bytes(16)
"""The digest of no tokens."""


def extend(digest: bytes, ids: Iterable[int]) -> list[bytes]:
    """The digest after each of some tokens, BLAKE2b of the one before and the token (RFC 7693), 16 bytes each.

    Args:
        digest: that of the tokens before.
        ids: tokens below 2⁶⁴.

    Example:
        >>> whole = extend(START, [1, 2, 3])
        >>> whole[2] == extend(whole[0], [2, 3])[-1]
        True
    """
    return list(accumulate(ids, _next, initial=digest))[1:]


def _next(digest: bytes, id: int) -> bytes:
    return blake2b(digest + id.to_bytes(8, "little"), digest_size=16).digest()
