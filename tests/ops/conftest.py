"""The CPU library as tests want it: forgotten, replaced, or with one of its instruction sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selective_ssm.ops import native


def _forget() -> None:
    for remembered in (native._loaded, native.vectors, native.function):
        remembered.cache_clear()


@pytest.fixture
def forget() -> Iterator[Callable[[], None]]:
    """Makes the library be looked for anew, and so after the test."""
    yield _forget
    _forget()


@pytest.fixture
def library_is(forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | None], None]:
    """Put another file, or none, in the place of the CPU library."""

    def replace(path: Path | None) -> None:
        monkeypatch.setattr(native, "_libraries", lambda: [path] if path else [])
        forget()

    return replace


@pytest.fixture(params=native.VECTORS)
def vectors(request: pytest.FixtureRequest, forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the library's instruction sets in turn."""
    reason = native.explain()
    if reason is None and request.param not in native.available():
        reason = f"this machine has no {request.param}"
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("SELECTIVE_SSM_VECTORS", request.param)
    forget()
    return request.param
