"""The hash of a text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from selective_ssm.generation.digest import START, extend

IDS = st.lists(st.integers(0, 2**64 - 1), max_size=20)


@given(IDS, IDS)
def test_a_digest_goes_on_from_where_it_stopped(first: list[int], rest: list[int]) -> None:
    begun = extend(START, first)
    assert extend(START, first + rest) == begun + extend([START, *begun][-1], rest)


@given(st.sets(st.lists(st.integers(0, 300), max_size=4).map(tuple)))
def test_texts_that_differ_have_other_digests(texts: set[tuple[int, ...]]) -> None:
    assert len({tuple(extend(START, text)[-1:]) for text in texts}) == len(texts)


def test_a_digest_is_the_same_everywhere() -> None:
    """Files hold it: BLAKE2b of 16 bytes, over the digest before and the token as 8 bytes, the lowest first."""
    from hashlib import blake2b

    expected = blake2b(bytes(16) + bytes([7, 1, *[0] * 6]), digest_size=16).digest()
    assert extend(START, [263]) == [expected]
