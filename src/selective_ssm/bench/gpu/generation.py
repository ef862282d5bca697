"""Whole texts on a GPU: reading, writing, serving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from selective_ssm.bench import writing
from selective_ssm.bench.cases import Setup, WritingCase
from selective_ssm.bench.gpu import models, serving
from selective_ssm.bench.gpu.cases import LoadCase, PrefillCase, SoakCase
from selective_ssm.bench.run import Row

_KINDS: Mapping[type[Any], Callable[[Any, Setup], Iterator[Row]]] = {
    PrefillCase: models.prefill,
    WritingCase: writing.writing,
    LoadCase: serving.ragged,
    SoakCase: serving.soak,
}


def generate(case: PrefillCase | WritingCase | LoadCase | SoakCase, setup: Setup) -> Iterator[Row]:
    """A case of one of these kinds."""
    return _KINDS[type(case)](case, setup)
