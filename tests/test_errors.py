from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest

from selective_ssm.errors import FileProblem, MissingPackage, UserError, choice, nearest, require


@pytest.mark.parametrize(("kind", "builtin"), [(FileProblem, OSError), (MissingPackage, ImportError)])
def test_problems_are_caught_as_user_errors_and_as_what_python_calls_them(
    kind: type[UserError], builtin: type[Exception]
) -> None:
    problem = pickle.loads(pickle.dumps(kind("one sentence")))
    assert isinstance(problem, UserError)
    assert isinstance(problem, ValueError)
    assert isinstance(problem, builtin)
    assert str(problem) == "one sentence"


def test_require_imports_what_is_there() -> None:
    assert require("json", extra="dev") is json


def test_require_names_the_package_and_the_command_that_installs_it() -> None:
    with pytest.raises(MissingPackage, match=r"'no_such_package'.*pip install 'selective-ssm\[plots\]'"):
        require("no_such_package.part", extra="plots")


def test_require_does_not_blame_a_package_for_what_is_missing_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_another.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package") as caught:
        require("needs_another", extra="plots")
    assert not isinstance(caught.value, MissingPackage)
    assert "needs_another" not in sys.modules


def test_nearest() -> None:
    assert nearest("max_step", ["max_steps", "seed"]) == " (did you mean 'max_steps'?)"
    assert nearest("xyz", ["max_steps", "seed"]) == ""
    assert nearest("xyz", []) == ""


def test_choice_accepts_only_what_is_allowed() -> None:
    choice("rank", "auto", ("auto", 1))
    choice("rank", 1, ("auto", 1))
    with pytest.raises(UserError, match=r"rank must be one of 'auto', 1, got 'atuo' \(did you mean 'auto'\?\)"):
        choice("rank", "atuo", ("auto", 1))
    for lookalike in (True, 1.0):
        with pytest.raises(UserError, match="got "):
            choice("rank", lookalike, ("auto", 1))
