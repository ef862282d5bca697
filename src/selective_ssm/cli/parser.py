"""The parser of one verb: jsonargparse, with our sentences, recipe names and configs."""

from __future__ import annotations

import re
from argparse import SUPPRESS
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from selective_ssm.config import Config, from_tagged, to_tagged
from selective_ssm.errors import FileProblem, UserError, nearest
from selective_ssm.files import read_text
from selective_ssm.recipes import recipe_path, recipes

C = TypeVar("C", bound=Config)
_TYPES = {"NoneType": "null", "dict": "a mapping"}


class Parser(ArgumentParser):
    """Parses one verb's words; every mistake becomes a `UserError` of one sentence.

    Args:
        verb: its name.
        description: what it does, for ``--help``.
    """

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(prog=f"selective-ssm {verb}", description=description, allow_abbrev=False, print_config=None)
        self.add_argument("--debug", action="store_true", help="show the traceback when something goes wrong")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say in one sentence what is wrong with the words, naming the nearest key where one is unknown."""
        raise UserError(self._sentence(message)) from ex

    def parse_words(self, words: Sequence[str]) -> Namespace:
        """Parse the words after the verb; wherever ``--config`` stands, what is given beside it wins."""
        return self.parse_args(_config_first(words) if "--config" in self._option_string_actions else list(words))

    def add_config(self, config: type[Config]) -> None:
        """Take ``--config`` with a file or a recipe's name, and an option ``--a.b`` for every key of a config."""
        self.add_argument("--config", action=_ConfigFile, help="a file, or a recipe's name: " + ", ".join(recipes()))
        self._add_keys(config, default=None, prefix="")

    def _add_keys(self, config: type[Config], default: Config | None, prefix: str, *, is_needed: bool = True) -> None:
        annotations = get_type_hints(config)
        explained = {one.arg_name: one.description for one in docstring_parser.parse(config.__doc__ or "").params}
        self.add_argument(f"--{prefix}kind", type=Literal[config.kind], default=config.kind, help=SUPPRESS)
        for field in fields(config):
            name, annotation = prefix + field.name, annotations[field.name]
            value = getattr(default, field.name) if default else field.default
            if section := _section(annotation):
                needed = is_needed and annotation is section
                self._add_keys(section, value if isinstance(value, Config) else None, f"{name}.", is_needed=needed)
                continue
            given = {"required": is_needed} if value is MISSING else {"default": _plain(value)}
            self.add_argument(f"--{name}", type=_option_type(annotation), help=explained.get(field.name), **given)

    def _sentence(self, message: str) -> str:
        """The message of jsonargparse, or of argparse below it, in our words; one that is not known stays as it is."""
        message = " ".join(message.split())
        if found := re.match(r"unrecognized arguments: (--[^ =]+)", message):
            return f"unknown option '{found[1]}'{_nearest_key(found[1], self._option_string_actions)}"
        if found := re.match(r"unrecognized arguments: (.+)", message):
            return f"too many words: '{found[1]}' is not expected"
        if found := re.match(r"(?:Group '(.+)' does not accept option|Option) '(.+?)'", message):
            key = f"{found[1]}.{found[2]}" if found[1] else found[2]
            return f"unknown key '{key}'{_nearest_key(key, [action.dest for action in self._actions])}"
        if found := re.match(r'Parser key "(.+?)": (.+?)\.? G(?:ot|iven) value.*: (.*)', message):
            return f"{found[1]}: {_expected(found[2])}, got '{found[3]}'"
        if found := re.match(r'Parser key "(.+?)": (.+)', message):
            return f"{found[1]}: {found[2]}"
        if message.startswith("the following arguments are required") and "--config" in self._option_string_actions:
            return f"{message}; --config takes them from a file or a recipe"
        return message


def _nearest_key(key: str, known: Iterable[str]) -> str:
    """Name the known key that looks most like a mistyped one: in its own section, if there is such a section."""
    section, dot, name = key.rpartition(".")
    siblings = [one[len(section) + 1 :] for one in known if dot and one.startswith(f"{section}.")]
    names = [one for one in siblings if "." not in one and one != "kind"]
    if not names:
        return nearest(key, known)
    if hint := nearest(name, names):
        return hint.replace("'", f"'{section}.", 1)
    return f"; {section.lstrip('-')} has: {', '.join(names)}"


def _expected(text: str) -> str:
    """What type was expected, out of jsonargparse's words."""
    types = text.partition(" Errors:")[0]
    names = [f"one of {one}" for one in re.findall(r"Literal\[(.*?)\]", types)]
    classes: list[str] = re.findall(r"<class '(\w+)'>", types)
    names += [_TYPES.get(one, one) for one in classes]
    return f"expected {' or '.join(names)}" if names else text[0].lower() + text[1:]


def _config_first(words: Sequence[str]) -> list[str]:
    """The words with each ``--config FILE`` before all others, in the order of the files."""
    configs: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--config":
            configs += [word, *islice(rest, 1)]
        else:
            (configs if word.startswith("--config=") else others).append(word)
    return configs + others


class _ConfigFile(ActionConfigFile):
    def __call__(self, parser: ArgumentParser, cfg: Namespace, values: str, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, str(_checked(_config_path(values))), option_string)


def _config_path(name: str) -> Path:
    """The file that ``--config`` names: one that is there, or a shipped recipe."""
    if name in recipes() and not Path(name).is_file():
        return recipe_path(name)
    if Path(name).exists():
        return Path(name)
    known = ", ".join(recipes())
    raise FileProblem(f"there is no file '{name}', and no recipe of that name{nearest(name, recipes())}: {known}")


def _checked(path: Path) -> Path:
    """Read a config file beforehand, so that what is wrong with the file itself is said in our words."""
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f" at line {place.line + 1}" if place else ""
        raise FileProblem(f"'{path}' is not valid YAML{line}: {getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict):
        found = "it is empty" if content is None else f"it holds a {type(content).__name__}"
        raise FileProblem(f"'{path}' is not a config of keys and values: {found}")
    return path


def config_from(options: Namespace, config: type[C], kinds: Mapping[str, type[Config]]) -> C:
    """Build the config that `Parser.add_config` took the keys of.

    Raises:
        UserError: a value is refused; the sentence names its place.
    """
    made = from_tagged(_given(config, options.as_dict()), kinds)
    assert isinstance(made, config)
    return made


def _given(config: type[Config], options: dict[str, Any]) -> dict[str, Any]:
    """A config's own keys among the options."""
    annotations = get_type_hints(config)
    given = {field.name: _said(annotations[field.name], options[field.name]) for field in fields(config)}
    return {"kind": options["kind"], **given}


def _said(annotation: Any, value: Any) -> Any:
    """What a key holds: null for a section that may be null, and of which nothing but defaults is known."""
    section = _section(annotation)
    if section is None or section is annotation or value is None:
        return value
    given = {key: one for key, one in value.items() if one is not None or hasattr(section, key)}
    return given if any(one != _plain(getattr(section, key, None)) for key, one in given.items()) else None


def _section(annotation: Any) -> type[Config] | None:
    """The config of one known class that a field holds, or may hold, so that each of its keys can be an option."""
    is_union = get_origin(annotation) in (Union, UnionType)
    found, *others = [one for one in get_args(annotation) if one is not type(None)] if is_union else [annotation]
    is_config = not others and isinstance(found, type) and issubclass(found, Config)
    return found if is_config and hasattr(found, "kind") else None


def _option_type(annotation: Any) -> Any:
    """The type of an option: the field's own; where one of several configs may stand, a mapping, or any YAML.

    A mapping's keys can be set one by one, ``--task.length 256``, over those that a file gives.
    """
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return dict[str, Any]
    return Any if _holds_config(annotation) else annotation


def _holds_config(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return True
    return any(map(_holds_config, get_args(annotation)))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return to_tagged(value) if isinstance(value, Config) else value
