"""Errors a person can act on: one sentence that says what was wrong, what was expected and what to do."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(ValueError):
    """A mistake of the person, told in one sentence; the command line prints it and exits with 2."""


class FileProblem(UserError, OSError):
    """A file or folder that cannot be read or written: missing, truncated, unwritable, on a full disk."""


class MissingPackage(UserError, ImportError):
    """An optional package that the wish needs and that is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say how to install it.

    Args:
        module: name of the module, as in an ``import`` statement.
        extra: the extra of ``selective-ssm`` that brings it.

    Returns:
        The imported module.

    Raises:
        MissingPackage: the package is not installed; the sentence holds the install command.

    Example:
        >>> require("json", extra="dev").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, something that it needs is not
        raise MissingPackage(
            f"this needs the package '{package}', which is not installed: pip install 'selective-ssm[{extra}]'"
        ) from error


def nearest(word: str, known: Iterable[str]) -> str:
    """Name the known word that looks most like a mistyped one.

    Returns:
        `` (did you mean '...'?)``, ready to be appended to a sentence, or an empty string when nothing is near.

    Example:
        >>> nearest("d_stat", ["d_model", "d_state"])
        " (did you mean 'd_state'?)"
        >>> nearest("colour", ["d_model", "d_state"])
        ''
    """
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Check that a value is one of a few allowed ones.

    Args:
        name: what the value is called, for the sentence.
        value: what came.
        allowed: what may come; ``1``, ``1.0`` and ``True`` are told apart.

    Raises:
        UserError: the value is none of them; the nearest one is named.

    Example:
        >>> choice("norm", "rmss", ("rms", "layer"))
        Traceback (most recent call last):
        selective_ssm.errors.UserError: norm must be one of 'rms', 'layer', got 'rmss' (did you mean 'rms'?)
    """
    known = list(allowed)
    if any(value == one and type(value) is type(one) for one in known):
        return
    hint = nearest(value, [one for one in known if isinstance(one, str)]) if isinstance(value, str) else ""
    raise UserError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}{hint}")
