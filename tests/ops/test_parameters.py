"""The structures that kernels are launched with, as C lays them out."""

from __future__ import annotations

import ctypes
from typing import ClassVar

import pytest

from selective_ssm.ops.causal_conv1d import cuda as conv
from selective_ssm.ops.parameters import Parameters
from selective_ssm.ops.selective_scan import cuda as scan
from selective_ssm.ops.selective_scan import step_cuda


class Pair(ctypes.Structure):
    _fields_: ClassVar = [("count", ctypes.c_int), ("size", ctypes.c_int64)]


class Mixed(Parameters):
    _fields_: ClassVar = [("pair", Pair), ("scale", ctypes.c_float), ("where", ctypes.c_void_p), ("last", ctypes.c_int)]


def test_every_field_lands_in_its_place() -> None:
    made = Mixed.of(3, -(2**40), 0.5, 2**48 + 1, True)
    assert (made.pair.count, made.pair.size, made.scale, made.where, made.last) == (3, -(2**40), 0.5, 2**48 + 1, 1)


@pytest.mark.parametrize(
    "kind",
    [getattr(module, name) for module in (conv, scan, step_cuda) for name in ("_Forward", "_Backward", "_Sum", "_Step")
     if hasattr(module, name)],
    ids=lambda kind: f"{kind.__module__.rpartition('.')[0].rpartition('.')[2]} {kind.__name__}",
)  # fmt: skip
def test_quickly_made_structures_are_those_of_ctypes(kind: type[Parameters]) -> None:
    def numbers(fields: list[tuple[str, type]]) -> int:
        return sum(numbers(of._fields_) if issubclass(of, ctypes.Structure) else 1 for _, of in fields)

    made = kind.of(*range(1, numbers(kind._fields_) + 1))
    assert len(bytes(made)) == ctypes.sizeof(kind)
    seen = list(_values(made))
    assert seen == list(range(1, len(seen) + 1))


def _values(of: ctypes.Structure) -> list[int]:
    values = (getattr(of, name) for name, _ in of._fields_)
    return [v for one in values for v in (_values(one) if isinstance(one, ctypes.Structure) else [one])]
