"""Configs: frozen dataclasses of plain data, to tagged JSON and back, strictly."""

from __future__ import annotations

import contextlib
import functools
import reprlib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from selective_ssm.errors import UserError, choice, nearest

Kinds = Mapping[str, "type[Config]"]
C = TypeVar("C", bound="Config")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every config: a frozen, keyword-only dataclass that names its ``kind``.

    Fields hold plain data only: ``int``, ``float``, ``bool``, ``str``, ``None``, a ``Literal``, another config, or
    tuples of those. So a config hashes, compares, pickles, and survives JSON unchanged. A subclass checks its values
    in ``__post_init__`` and raises `UserError`.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class NormConfig(Config):
        ...     kind: ClassVar[str] = "norm"
        ...     eps: float = 1e-5
        >>> to_tagged(NormConfig())
        {'kind': 'norm', 'eps': 1e-05}
        >>> from_tagged({"kind": "norm", "esp": 1.0}, {"norm": NormConfig})
        Traceback (most recent call last):
        selective_ssm.errors.UserError: unknown key 'esp' (did you mean 'eps'?); norm has: eps
    """

    kind: ClassVar[str]


def to_tagged(config: Config) -> dict[str, Any]:
    """Turn a config into JSON's own types, every field written: ``{"kind": …, field: value, …}``.

    Raises:
        TypeError: a field holds something that is not plain data.
    """
    values = {field.name: _plain(getattr(config, field.name), field.name) for field in fields(config)}
    return {"kind": config.kind, **values}


def from_tagged(data: object, kinds: Kinds) -> Config:
    """Build a config from what `to_tagged` wrote, refusing everything that is not exactly expected.

    Args:
        data: ``{"kind": …, field: value, …}``; fields left out take their defaults, lists become tuples.
        kinds: the config class of each kind that may appear, nested ones included.

    Returns:
        The config, equal to the one that was written.

    Raises:
        UserError: an unknown kind or key, a missing required key, a wrong type or a refused value; the sentence names
            the place, such as ``pattern[0].ssm.d_state``.
    """
    return _config(data, Config, kinds, "")


def _plain(value: object, place: str) -> object:
    if isinstance(value, Config):
        return to_tagged(value)
    if isinstance(value, tuple):
        return [_plain(item, place) for item in value]
    if value is None or type(value) in (int, float, bool, str):
        return value
    raise TypeError(f"{place} must hold plain data (numbers, texts, tuples, configs), got {type(value).__name__}")


def _config(data: object, base: type[C], kinds: Kinds, place: str) -> C:
    if not isinstance(data, Mapping):
        raise _wrong(place, "a mapping with a 'kind'", data)
    given: dict[str, object] = dict(data)
    kind = given.pop("kind", None)
    allowed = {name: one for name, one in kinds.items() if issubclass(one, base)}
    if not isinstance(kind, str):
        raise UserError(f"{_at(place)}a 'kind' is missing; it is one of {_listed(allowed)}")
    if kind not in allowed:
        raise UserError(f"{_at(place)}unknown kind '{kind}'{nearest(kind, allowed)}; known are {_listed(allowed)}")
    made = allowed[kind]
    values = _values(given, made, kinds, place)
    try:
        return made(**values)
    except UserError as error:
        raise UserError(f"{_at(place)}{error}") from error


def _values(given: Mapping[str, object], made: type[Config], kinds: Kinds, place: str) -> dict[str, object]:
    """Check the keys and the types of a config's fields."""
    annotations, required = _fields(made)
    for key in given:
        if key not in annotations:
            hint = nearest(key, annotations)
            raise UserError(f"{_at(place)}unknown key '{key}'{hint}; {made.kind} has: {', '.join(annotations)}")
    for key in required:
        if key not in given:
            raise UserError(f"{_at(place)}the key '{key}' of {made.kind} is missing, and it has no default")
    inside = f"{place}." if place else ""
    return {key: _value(value, annotations[key], kinds, inside + key) for key, value in given.items()}


@functools.cache
def _fields(made: type[Config]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The annotation of each field, and the names of those without a default."""
    hints = get_type_hints(made)
    own = fields(made)
    required = tuple(one.name for one in own if one.default is MISSING and one.default_factory is MISSING)
    return {one.name: hints[one.name] for one in own}, required


def _value(value: object, annotation: Any, kinds: Kinds, place: str) -> object:
    """Check one value against its annotation, and build the configs and tuples in it."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _any_of(value, get_args(annotation), kinds, place)
    if origin is Literal:
        choice(place, value, get_args(annotation))
        return value
    if origin is tuple:
        return _tuple(value, get_args(annotation), kinds, place)
    if _is_config(annotation):
        return _config(value, annotation, kinds, place)
    if annotation is float and type(value) is int:
        return float(value)
    if type(value) is not annotation:
        raise _wrong(place, _spoken(annotation), value)
    return value


def _any_of(value: object, arms: tuple[Any, ...], kinds: Kinds, place: str) -> object:
    """The first arm of a union that takes the value; its very type goes before one that would convert it."""
    if type(value) in arms:
        return value
    others = [arm for arm in arms if arm is not type(None)]
    if isinstance(value, Mapping):  # it can only be meant as a config, which then names the mistake inside it
        others = [arm for arm in others if _is_config(arm)]
    if len(others) == 1:
        return _value(value, others[0], kinds, place)
    for arm in others:
        with contextlib.suppress(UserError):
            return _value(value, arm, kinds, place)
    raise _wrong(place, " or ".join(map(_spoken, arms)), value)


def _tuple(value: object, items: tuple[Any, ...], kinds: Kinds, place: str) -> tuple[object, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(place, "a list", value)
    given: list[object] = list(value)
    expected = [items[0]] * len(given) if items[1:] == (...,) else list(items)
    if len(given) != len(expected):
        raise UserError(f"{place} must have {len(expected)} items, got {len(given)}")
    pairs = enumerate(zip(given, expected, strict=True))
    return tuple(_value(one, annotation, kinds, f"{place}[{index}]") for index, (one, annotation) in pairs)


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _wrong(place: str, expected: str, value: object) -> UserError:
    return UserError(f"{place or 'a config'} must be {expected}, got {reprlib.repr(value)} ({type(value).__name__})")


def _spoken(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, get_args(annotation)))
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _at(place: str) -> str:
    return f"{place}: " if place else ""


def _listed(words: Iterable[str]) -> str:
    return ", ".join(f"'{word}'" for word in words)
