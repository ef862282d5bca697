from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any, ClassVar, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selective_ssm.config import Config, from_tagged, to_tagged
from selective_ssm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class InnerConfig(Config):
    """Base of what may stand inside."""


@dataclass(frozen=True, kw_only=True)
class StateConfig(InnerConfig):
    kind: ClassVar[str] = "state"
    d_state: int = 16
    rank: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.d_state < 1:
            raise UserError(f"d_state must be at least 1, got {self.d_state}")


@dataclass(frozen=True, kw_only=True)
class BlockConfig(Config):
    kind: ClassVar[str] = "block"
    width: int
    ssm: InnerConfig = StateConfig()
    eps: float = 1e-5
    gated: bool = True
    name: str | None = None
    norm: Literal["rms", "layer"] = "rms"
    limits: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class StackConfig(Config):
    kind: ClassVar[str] = "stack"
    pattern: tuple[BlockConfig, ...] = ()
    grid: tuple[tuple[int, ...], ...] = ((1, 2), (), (3,))
    extra: Optional[InnerConfig] = None  # noqa: UP045, the older spelling is understood too


KINDS: dict[str, type[Config]] = {one.kind: one for one in (StateConfig, BlockConfig, StackConfig)}

states = st.builds(StateConfig, d_state=st.integers(1), rank=st.just("auto") | st.integers())
blocks = st.builds(
    BlockConfig,
    width=st.integers(),
    ssm=states,
    eps=st.floats(allow_nan=False),
    gated=st.booleans(),
    name=st.none() | st.text(),
    norm=st.sampled_from(["rms", "layer"]),
    limits=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
)
stacks = st.builds(
    StackConfig,
    pattern=st.lists(blocks, max_size=3).map(tuple),
    grid=st.lists(st.lists(st.integers(), max_size=3).map(tuple), max_size=3).map(tuple),
    extra=st.none() | states,
)


@given(stacks)
def test_every_config_survives_json_and_pickle_unchanged(config: StackConfig) -> None:
    again = from_tagged(json.loads(json.dumps(to_tagged(config))), KINDS)
    assert again == config
    assert hash(again) == hash(config)
    assert repr(again) == repr(config)  # types too: 1 is not 1.0
    assert pickle.loads(pickle.dumps(config)) == config


def test_every_field_is_written_and_defaults_need_not_be() -> None:
    written = to_tagged(BlockConfig(width=4))
    assert written["ssm"] == {"kind": "state", "d_state": 16, "rank": "auto"}
    assert written["limits"] == [0.0, 1.0]
    assert from_tagged({"kind": "block", "width": 4}, KINDS) == BlockConfig(width=4)


def test_an_integer_is_taken_where_a_float_is_asked_and_becomes_one() -> None:
    config = from_tagged({"kind": "block", "width": 4, "eps": 1}, KINDS)
    assert isinstance(config, BlockConfig)
    assert repr(config.eps) == "1.0"


Change = Callable[[dict[str, Any]], object]


def nested() -> dict[str, Any]:
    return to_tagged(StackConfig(pattern=(BlockConfig(width=4), BlockConfig(width=5)), extra=StateConfig()))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda data: data.pop("kind"), "a 'kind' is missing; it is one of 'state', 'block', 'stack'"),
        (lambda data: data.update(kind="stak"), "unknown kind 'stak' (did you mean 'stack'?)"),
        (lambda data: data.update(grids=1), "unknown key 'grids' (did you mean 'grid'?); stack has: pattern, grid, ex"),
        (lambda data: data.update(pattern=3), "pattern must be a list, got 3 (int)"),
        (lambda data: data["pattern"].append(7), "pattern[2] must be a mapping with a 'kind', got 7 (int)"),
        (lambda data: data["pattern"][0].pop("width"), "pattern[0]: the key 'width' of block is missing"),
        (lambda data: data["pattern"][1].update(width=True), "pattern[1].width must be int, got True (bool)"),
        (lambda data: data["pattern"][1].update(width="4"), "pattern[1].width must be int, got '4' (str)"),
        (lambda data: data["pattern"][1].update(gated=1), "pattern[1].gated must be bool, got 1 (int)"),
        (lambda data: data["pattern"][1].update(eps=True), "pattern[1].eps must be float, got True (bool)"),
        (lambda data: data["pattern"][1].update(name=1), "pattern[1].name must be str, got 1 (int)"),
        (lambda data: data["pattern"][1].update(norm="rmss"), "pattern[1].norm must be one of 'rms', 'layer'"),
        (lambda data: data["pattern"][1].update(limits=[0.5]), "pattern[1].limits must have 2 items, got 1"),
        (lambda data: data["pattern"][1].update(ssm={"kind": "block"}), "pattern[1].ssm: unknown kind 'block'"),
        (lambda data: data["pattern"][1]["ssm"].update(d_stat=1), "pattern[1].ssm: unknown key 'd_stat' (did you mean"),
        (lambda data: data["pattern"][1]["ssm"].update(d_state=0), "pattern[1].ssm: d_state must be at least 1, got 0"),
        (lambda data: data["pattern"][1]["ssm"].update(rank=1.5), "pattern[1].ssm.rank must be int or one of 'auto'"),
        (lambda data: data["grid"][0].append("x"), "grid[0][2] must be int, got 'x' (str)"),
        (lambda data: data["extra"].update(d_state=None), "extra.d_state must be int, got None"),
    ],
)
def test_a_mistake_is_told_with_its_place(change: Change, sentence: str) -> None:
    data = nested()
    change(data)
    with pytest.raises(UserError) as caught:
        from_tagged(data, KINDS)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("data", [None, [], "stack", 3])
def test_what_is_no_mapping_is_refused(data: object) -> None:
    with pytest.raises(UserError, match="a config must be a mapping with a 'kind'"):
        from_tagged(data, KINDS)


def test_only_plain_data_is_written() -> None:
    with pytest.raises(TypeError, match="width must hold plain data"):
        to_tagged(BlockConfig(width=object()))  # type: ignore[arg-type]


def test_configs_are_frozen_and_keyword_only() -> None:
    config = BlockConfig(width=4)
    with pytest.raises(FrozenInstanceError):
        config.width = 5  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        BlockConfig(4)  # type: ignore[misc]
    assert replace(config, width=5) == BlockConfig(width=5)
