"""Without transformers each door says what to install."""

from __future__ import annotations

import sys

import pytest

from selective_ssm.errors import MissingPackage
from selective_ssm.interop.transformers import auto, mixer, register


def test_each_door_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in sys.modules if one.startswith("transformers.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for door in (register, auto.classes.__wrapped__, mixer.fast_mixers.__wrapped__):
        with pytest.raises(MissingPackage, match=r"pip install 'selective-ssm\[transformers\]'"):
            door()


@pytest.mark.parametrize("module", [auto, mixer])
def test_a_module_has_no_names_but_its_own(module: object) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        module.Nothing  # noqa: B018
