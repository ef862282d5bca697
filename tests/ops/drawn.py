"""Draws cases for the wide grid: what kernels are compiled for (a kind), then sizes, layouts and values (a trial).

Legend: B batch, L length, D channels = G groups x P, N state, K width, S sequences in a pack.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.ops.guards import Guards
from tests.ops.trial import LANES, Trial

SINGLE = torch.float32
DTYPES = (torch.bfloat16, torch.float16, SINGLE)
STATES = (16, 1, 16, 3, 8, 16, 40, 24, 16, 256)
WIDTHS = (4, 2, 4, 3, 1, 4, 9, 5)
MOST_NUMBERS = 2**22
"""B L D N of a case at most; eight times as many in long ones."""


@dataclass(frozen=True)
class Kind:
    """What kernels are compiled for."""

    operator: str
    dtypes: tuple[torch.dtype, ...]  # of u, delta, z, B, C; of x, weight, bias, state
    size: int  # N or K
    optional: str  # "z" of a scan, "b" and "i" of a convolution, where they are given
    aligned: bool  # whether rows are whole vectors
    active: bool  # the softplus, or SiLU
    fixed: str = ""
    discretization: str = "euler"
    lanes: int = 8


def draw_kind(chance: Random, operator: str, number: int) -> Kind:
    """The kind of this number; over some dozens everything comes up."""
    scan = operator.startswith("selective_scan")
    mixed = chance.random() < 0.3
    dtypes = tuple(chance.choice(DTYPES) if mixed else DTYPES[number % 3] for _ in range(5 if scan else 4))
    aligned, active = chance.random() < 0.6, chance.random() < 0.75
    if not scan:
        optional = "".join(letter for letter in "bi" if chance.random() < 0.7)
        return Kind(operator, dtypes, WIDTHS[number % len(WIDTHS)], optional, aligned, active)
    return Kind(
        operator,
        dtypes,
        STATES[number % len(STATES)],
        "z" if chance.random() < 0.7 else "",
        aligned,
        active,
        fixed=chance.choice(("", "", "", "", "B", "C", "BC")),
        discretization="zoh" if chance.random() < 0.3 else "euler",
        lanes=LANES[number // 3 % len(LANES)],
    )


class Maker:
    """Makes tensors between guards, of drawn values and layouts."""

    def __init__(self, kind: Kind, chance: Random, generator: torch.Generator, guards: Guards) -> None:
        self.kind, self.chance, self.generator, self.guards = kind, chance, generator, guards
        self.words: list[str] = []

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.generator.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.generator.device)

    def plain(self, x: Tensor, dtype: torch.dtype = SINGLE) -> Tensor:
        """As it is."""
        return self.guards.copy(x.to(dtype), x.device)

    def transposed(self, x: Tensor, dtype: torch.dtype = SINGLE) -> Tensor:
        """At times with its axes the other way round in memory."""
        if self.chance.random() < 0.7:
            return self.plain(x, dtype)
        return self.plain(x.movedim(-1, 0).contiguous().movedim(0, -1), dtype)

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, L, ...) or (B, ...) with rows that lie next to each other, apart, or with the length first."""
        row = math.prod(x.shape[2:]) if x.dim() > 2 else x.shape[1]
        vectors, layout = self.kind.aligned, self.chance.choice(("dense", "apart", "length first"))
        self.words.append(layout)
        apart = 0 if layout == "dense" else 8 * self.chance.randrange(1, 9) + (not vectors)
        inner = x[0].contiguous().stride()[x.dim() > 2 :]
        if x.dim() == 2:
            strides = (row + apart, 1)
        elif layout == "length first":
            strides = (row + apart, x.shape[0] * (row + apart), *inner)
        else:
            gap = 8 if layout == "apart" else 0
            strides = (x.shape[1] * (row + apart) + gap, row + apart, *inner)
        offset = not vectors  # a row then begins in the middle of a vector
        shape = tuple(x.shape)
        buffer = self.guards.buffer((1 + offset, *shape), (1, *strides), dtype, x.device)
        return buffer[int(offset)].copy_(x)


def draw_trial(kind: Kind, chance: Random, generator: torch.Generator, guards: Guards, longest: int) -> Trial:
    """A case of a kind, of at most so many tokens."""
    make = Maker(kind, chance, generator, guards)
    if kind.operator.endswith("step"):
        trial = _scan_step(make) if kind.operator.startswith("selective_scan") else _conv_step(make)
    else:
        trial = _sequence(make, longest)
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in trial.tensors.items())
    layouts, drawn = "/".join(make.words), {name: str(x) for name, x in trial.options.items()}
    trial.words = f"{kind} {trial.plan} {shapes} {drawn} {layouts}"
    return trial


def _length(chance: Random, longest: int) -> int:
    """Mostly short."""
    share = chance.random()
    if share < 0.02:
        return 0
    low, high = next(span for limit, span in _SPANS if share < limit)
    return min(longest, round(math.exp(chance.uniform(math.log(low), math.log(high)))))


_SPANS = ((0.1, (1, 3)), (0.65, (3, 200)), (0.9, (200, 2000)), (0.99, (2000, 20_000)), (1.0, (20_000, 300_000)))


def _sizes(make: Maker, longest: int) -> tuple[int, int, int, int, list[int] | None]:
    """B, L, D, G, and the offsets of a pack."""
    kind, chance = make.kind, make.chance
    length = _length(chance, longest)
    packed = chance.random() < 0.4
    batch = 1 if packed else chance.choice((1, 1, 2, 3, 5))
    groups = chance.choice((1, 1, 1, 1, 2, 3, 8)) if kind.operator == "selective_scan" else 1
    shares = [8, 16, 24, 40, 72, 136, 520] if kind.aligned else [1, 2, 5, 7, 13, 33, 64, 67, 129, 257]
    most = MOST_NUMBERS * (8 if length > 2000 else 1) // kind.size
    fitting = [share for share in shares if batch * length * groups * share <= most]
    if not fitting:
        batch, groups = 1, 1
        fitting = [share for share in shares if length * share <= most] or shares[:1]
        length = min(length, most // fitting[0])
    cuts = sorted(chance.randrange(length + 1) for _ in range(chance.choice((0, 1, 2, 5, 20, 40))))
    return batch, length, groups * chance.choice(fitting), groups, [0, *cuts, length] if packed else None


def _sequence(make: Maker, longest: int) -> Trial:
    """A whole sequence of either operator."""
    kind, chance = make.kind, make.chance
    scan = kind.operator == "selective_scan"
    batch, length, channels, groups, offsets = _sizes(make, longest)
    rows = batch if offsets is None else len(offsets) - 1
    draw = _scan if scan else _conv
    tensors = draw(make, (batch, length), channels, groups, rows)
    first = next(iter(tensors.values()))
    terms = dict.fromkeys(("d_A", "d_D", "d_delta_bias", "d_weight", "d_bias"), batch * length)
    terms |= {f"d_{name}": batch * length if name in kind.fixed else channels // groups for name in "BC"}
    options = _options(kind) | {"reverse": chance.random() < 0.4}
    if offsets is not None:
        wide = chance.choice((torch.int32, torch.int64))
        options["cu_seqlens"] = torch.tensor(offsets, dtype=wide, device=first.device)
    d_out = make.rows(make.normal(*first.shape), first.dtype)
    if chance.random() < 0.1:
        d_out = make.plain(make.normal(channels), first.dtype).expand(first.shape)
    d_final = None
    if chance.random() < 0.7:
        state = make.normal(rows, channels, kind.size if scan else kind.size - 1)
        d_final = make.transposed(state, SINGLE if scan else first.dtype)
    trial = Trial(kind.operator, "", make.guards, batch * length, tensors, options, (d_out, d_final), terms)
    bounds = [0, length] if offsets is None else offsets
    trial.longest = max(end - start for start, end in itertools.pairwise(bounds))
    if scan:
        trial.plan = {"lanes": kind.lanes} | ({"pieces": chance.randrange(1, 9)} if chance.random() < 0.4 else {})
    return trial


def _options(kind: Kind) -> dict[str, Any]:
    if kind.operator.startswith("selective_scan"):
        return {"delta_softplus": kind.active, "discretization": kind.discretization}
    return {"activation": "silu" if kind.active else None}


def _scan(make: Maker, leading: tuple[int, ...], channels: int, groups: int, rows: int) -> dict[str, Tensor]:
    tensors = _scan_tensors(make, leading, channels, groups)
    if make.chance.random() < 0.6:
        tensors["initial_state"] = make.transposed(make.normal(rows, channels, make.kind.size))
    return tensors


def _scan_tensors(make: Maker, leading: tuple[int, ...], channels: int, groups: int) -> dict[str, Tensor]:
    """What a scan and a step share; with rates and steps as they are drawn at a model's start, or wilder."""
    kind, chance, states = make.kind, make.chance, make.kind.size
    u_type, delta_type, z_type, B_type, C_type = kind.dtypes
    wild = chance.random() < 0.5
    make.words.append("wild" if wild else "as a model starts")
    if wild:
        A, delta = (
            -4 * make.uniform(channels, states) - 0.1,
            make.normal(*leading, channels) * chance.choice((1, 1, 10)),
        )
        bias = make.normal(channels)
    else:
        A = -torch.arange(1.0, states + 1, device=make.generator.device).expand(channels, states)
        delta = 0.5 * make.normal(*leading, channels)
        bias = torch.exp(make.uniform(channels) * math.log(100) + math.log(1e-3)).expm1().log()
    if not kind.active:
        delta, bias = delta.abs() * (0.5 if wild else 0.02), bias.abs() * (0.5 if wild else 1e-3)

    def map_of(name: str, dtype: torch.dtype) -> Tensor:
        if name in kind.fixed:
            return make.plain(make.normal(channels, states), dtype)
        made = make.rows(make.normal(*leading, groups, states), dtype)
        return made.squeeze(-2) if groups == 1 and chance.random() < 0.5 else made

    tensors = {
        "u": make.rows(make.normal(*leading, channels), u_type),
        "delta": make.rows(delta, delta_type),
        "A": make.transposed(A),
        "B": map_of("B", B_type),
        "C": map_of("C", C_type),
    }
    if chance.random() < 0.6:
        tensors["D"] = make.plain(make.normal(channels))
    if kind.optional:
        tensors["z"] = make.rows(make.normal(*leading, channels), z_type)
    if chance.random() < 0.7 or not wild:
        tensors["delta_bias"] = make.plain(bias)
    return tensors


def _conv(make: Maker, leading: tuple[int, ...], channels: int, _: int, rows: int) -> dict[str, Tensor]:
    tensors = {"x": make.rows(make.normal(*leading, channels), make.kind.dtypes[0])} | _filter(make, channels)
    if "i" in make.kind.optional:
        tensors["initial_state"] = make.transposed(make.normal(rows, channels, make.kind.size - 1), make.kind.dtypes[3])
    return tensors


def _filter(make: Maker, channels: int) -> dict[str, Tensor]:
    kind = make.kind
    tensors = {"weight": make.transposed(make.normal(channels, kind.size), kind.dtypes[1])}
    if "b" in kind.optional:
        tensors["bias"] = make.plain(make.normal(channels), kind.dtypes[2])
    return tensors


def _step(make: Maker, tensors: dict[str, Tensor], entries: int, dtype: torch.dtype) -> Trial:
    """A step of either operator, its state a part of a wider buffer, with slots or without."""
    chance, first = make.chance, next(iter(tensors.values()))
    options = _options(make.kind)
    batch, channels = first.shape
    slots = batch
    if chance.random() < 0.6:
        slots = batch + chance.randrange(4)
        indices = chance.sample(range(slots), batch)
        indices = [-1 - chance.randrange(3) if chance.random() < 0.2 else i for i in indices]
        wide = chance.choice((torch.int32, torch.int64))
        options["state_indices"] = torch.tensor(indices, dtype=wide, device=first.device)
    apart = channels * entries + (8 * chance.randrange(3) if make.kind.aligned else 3)
    state = make.guards.buffer((slots, channels, entries), (apart, entries, 1), dtype, first.device)
    state.copy_(make.normal(slots, channels, entries))
    return Trial(make.kind.operator, "", make.guards, batch, {"state": state, **tensors}, options)


def _batch_and_channels(make: Maker, groups: int) -> tuple[int, int]:
    few = [8, 16, 72, 520, 2048] if make.kind.aligned else [1, 3, 7, 33, 129, 1001]
    return make.chance.choice((1, 1, 2, 3, 8, 33, 300)), groups * make.chance.choice(few)


def _scan_step(make: Maker) -> Trial:
    groups = make.chance.choice((1, 1, 1, 2, 3))
    batch, channels = _batch_and_channels(make, groups)
    if batch == channels and make.kind.fixed:
        batch += 1  # else a time-invariant map would be read as one of each row
    tensors = _scan_tensors(make, (batch,), channels, groups)
    return _step(make, tensors, make.kind.size, SINGLE)


def _conv_step(make: Maker) -> Trial:
    batch, channels = _batch_and_channels(make, 1)
    tensors = {"x": make.rows(make.normal(batch, channels), make.kind.dtypes[0])} | _filter(make, channels)
    return _step(make, tensors, make.kind.size - 1, make.kind.dtypes[3])
