"""Configs on the command line: files, recipes, an option for every key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from selective_ssm.cli.parser import Parser, config_from
from selective_ssm.config import Config, to_tagged
from selective_ssm.errors import UserError
from selective_ssm.files import write_json


class Part(Config):
    """What stands in a list of parts: one of several kinds."""


@dataclass(frozen=True, kw_only=True)
class Wheel(Part):
    kind: ClassVar[str] = "wheel"
    radius: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Engine(Config):
    """What moves it.

    Args:
        power: in kilowatts.
    """

    kind: ClassVar[str] = "engine"
    power: int = 50
    fuel: Literal["petrol", "none"] = "none"


@dataclass(frozen=True, kw_only=True)
class Trailer(Config):
    kind: ClassVar[str] = "trailer"
    wheels: int
    colour: str | None = "red"


@dataclass(frozen=True, kw_only=True)
class Car(Config):
    kind: ClassVar[str] = "car"
    name: str
    trailer: Trailer | None = None
    owner: str | None = None
    engine: Engine = Engine(power=70)
    parts: tuple[Part, ...] = (Wheel(),)
    spare: Part = Wheel()
    range: tuple[int, int] = (1, 2)


KINDS: dict[str, type[Config]] = {one.kind: one for one in (Wheel, Engine, Trailer, Car)}


def parsed(*words: str | Path) -> Car:
    parser = Parser("drive", "drives")
    parser.add_config(Car)
    return config_from(parser.parse_words([str(word) for word in words]), Car, KINDS)


def test_keys_that_are_not_given_take_the_config_s_defaults() -> None:
    assert parsed("--name", "a") == Car(name="a")


def test_a_file_is_read_and_every_key_can_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "car.yaml"
    path.write_text("name: a\nowner: me\nengine: {power: 1, fuel: petrol}\nparts: [{kind: wheel}, {kind: wheel}]\n")
    from_file = Car(name="a", owner="me", engine=Engine(power=1, fuel="petrol"), parts=(Wheel(), Wheel()))
    assert parsed("--config", path) == from_file
    expected = Car(name="7", engine=Engine(power=2, fuel="petrol"), parts=(Wheel(radius=1.0),), range=(3, 4))
    words = ("--name", "7", "--owner", "null", "--engine.power", "2", "--range", "[3, 4]")
    assert parsed("--config", path, *words, "--parts", '[{"kind": "wheel", "radius": 1e0}]') == expected
    assert parsed("--config", path, "--parts", "[{kind: wheel}, {kind: wheel}]") == from_file


def test_a_key_of_a_section_of_one_of_several_kinds_is_set_over_the_file_s(tmp_path: Path) -> None:
    path = tmp_path / "car.yaml"
    path.write_text("name: a\nspare: {kind: wheel, radius: 0.25}\n")
    assert parsed("--config", path).spare == Wheel(radius=0.25)
    assert parsed("--config", path, "--spare.radius", "0.75").spare == Wheel(radius=0.75)
    assert parsed("--config", path, "--spare", "{kind: wheel}").spare == Wheel()


def test_a_section_that_may_be_null_is_null_until_something_is_said_of_it(tmp_path: Path) -> None:
    assert parsed("--name", "a", "--trailer.wheels", "2") == Car(name="a", trailer=Trailer(wheels=2))
    colourless = Car(name="a", trailer=Trailer(wheels=2, colour=None))
    assert parsed("--name", "a", "--trailer.wheels", "2", "--trailer.colour", "null") == colourless
    for car in (Car(name="a"), colourless):
        write_json(tmp_path / "car.json", to_tagged(car))
        assert parsed("--config", tmp_path / "car.json") == car
    assert parsed("--config", tmp_path / "car.json", "--trailer.wheels", "4").trailer == Trailer(wheels=4, colour=None)


def test_a_file_never_wins_over_an_option_wherever_it_stands(tmp_path: Path) -> None:
    path, other = tmp_path / "car.yaml", tmp_path / "other.yaml"
    path.write_text("name: a\nowner: me\n")
    other.write_text("owner: you\n")
    for config in (("--config", path), (f"--config={path}",)):
        assert parsed("--name", "b", *config) == Car(name="b", owner="me")
        assert parsed("--name", "b", *config, "--config", other) == Car(name="b", owner="you"), "the later file wins"


def test_a_saved_config_is_a_config_file(tmp_path: Path) -> None:
    car = Car(name="b", engine=Engine(fuel="petrol"), parts=())
    write_json(tmp_path / "car.json", to_tagged(car))
    assert parsed("--config", tmp_path / "car.json") == car


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the following arguments are required: name; --config takes them from a file or a recipe"),
        (["--name", "a", "--engin.power", "1"], "unknown option '--engin.power' (did you mean '--engine.power'?)"),
        (["--name", "a", "--engine.power", "1.5"], "engine.power: expected int, got '1.5'"),
        (["--name", "a", "--engine.fuel", "x"], "engine.fuel: expected one of 'petrol', 'none', got 'x'"),
        (["--name", "a", "--parts", "[{kind: weel}]"], "parts[0]: unknown kind 'weel' (did you mean 'wheel'?)"),
        (["--name", "a", "--trailer.colour", "blue"], "trailer: the key 'wheels' of trailer is missing"),
        (
            ["--name", "a", "--trailer.wheel", "2"],
            "unknown option '--trailer.wheel' (did you mean '--trailer.wheels'?)",
        ),
        (["--name", "a", "--engine.weight", "2"], "unknown option '--engine.weight'; engine has: power, fuel"),
        (["--name", "a", "--spare.radios", "2"], "spare: unknown key 'radios' (did you mean 'radius'?)"),
        (["--name", "a", "--spare", "3"], "spare: expected a mapping, got '3'"),
        (["--name", "a", "--parts", "3"], "parts must be a list, got 3 (int)"),
        (["--name", "a", "--kind", "lorry"], "kind: expected one of 'car', got 'lorry'"),
        (["--name"], "argument --name: expected one argument"),
        (["--name", "a", "--config"], "argument --config: expected one argument"),
    ],
)
def test_what_does_not_fit_is_told_in_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as told:
        parsed(*words)
    assert str(told.value).startswith(sentence)


def test_keys_are_explained_by_the_config_s_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    assert "in kilowatts. (type: int, default: 70)" in " ".join(capsys.readouterr().out.split())
