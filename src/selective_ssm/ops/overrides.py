"""Fields of plans that benchmarks and tests choose instead of the plan's own rule."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import replace
from typing import Any, TypeVar

Plan = TypeVar("Plan", bound=Any)


class Overrides:
    """What is chosen for one kind of plan, a frozen dataclass; nothing, but for as long as a block says otherwise."""

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}

    @contextlib.contextmanager
    def chosen(self, **fields: Any) -> Generator[None]:
        """Plans have these fields while it lasts: for benchmarks."""
        before, self._fields = self._fields, self._fields | fields
        try:
            yield
        finally:
            self._fields = before

    def apply(self, plan: Plan, **kept: Any) -> Plan:
        """The plan with the fields that are chosen, but for those that are to keep a value whatever is chosen."""
        return replace(plan, **self._fields | kept) if self._fields else plan
