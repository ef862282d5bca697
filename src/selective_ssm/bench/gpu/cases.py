"""What is timed on a GPU: operators alone, mixers, whole blocks, whole models.

Legend: B batch, L length, D channels, N state, K conv width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from selective_ssm.bench.cases import ModelCase, OpCase, WritingCase
from selective_ssm.layers import (
    AttentionConfig,
    GAUConfig,
    H3Config,
    HyenaConfig,
    HyenaFilterConfig,
    MambaConfig,
    MixerConfig,
    MLPConfig,
    PlainConfig,
    RetNetConfig,
    RWKVChannelConfig,
    RWKVConfig,
    S4Config,
    S4DConfig,
)


@dataclass(frozen=True, kw_only=True)
class LengthCase:
    """So many tokens of attention, and of a scan of as wide a model, in rows of one length.

    Args:
        length: L.
        batch: B.
        d_model: of the attention; the scan has twice as many channels, as in a Mamba block.
        head_dim: of the attention.
    """

    length: int
    batch: int
    d_model: int = 1024
    head_dim: int = 64

    @property
    def name(self) -> str:
        """What ``--case`` calls it."""
        return f"L{self.length}"


@dataclass(frozen=True, kw_only=True)
class CallCase:
    """A case without sizes to choose.

    Args:
        name: what ``--case`` calls it.
        scan: the tensors.
    """

    name: str
    scan: OpCase


@dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """A model that writes so many texts side by side.

    Args:
        preset: its name.
        batch: B.
    """

    preset: str
    batch: int

    @property
    def name(self) -> str:
        """What ``--case`` calls it: PRESET-B."""
        return f"{self.preset}-{self.batch}"


@dataclass(frozen=True, kw_only=True)
class ForkCase:
    """A text's state that is copied.

    Args:
        preset: the model's name.
        copies: how many at once.
    """

    preset: str
    copies: tuple[int, ...] = (1, 8, 64)

    @property
    def name(self) -> str:
        """What ``--case`` calls it."""
        return f"{self.preset}-fork"


@dataclass(frozen=True, kw_only=True)
class PrefillCase(ModelCase):
    """Prompts that are read."""

    @property
    def name(self) -> str:
        """What ``--case`` calls it: PRESET-prefill-BxL."""
        return f"{self.preset}-prefill-{self.batch}x{self.length}"


@dataclass(frozen=True, kw_only=True)
class LoadCase:
    """Texts of any length that an engine is asked for at once.

    Args:
        preset: the model's name.
        texts: how many.
        prompt: the shortest and the longest prompt.
        new_tokens: the fewest and the most tokens that follow one.
        slots: of the engine; one for each number.
        budgets: tokens of prompts that its step reads at most; one for each.
    """

    preset: str
    texts: int = 512
    prompt: tuple[int, int] = (16, 1024)
    new_tokens: tuple[int, int] = (64, 512)
    slots: tuple[int, ...] = (128, 512)
    budgets: tuple[int, ...] = (2048, 8192)

    @property
    def name(self) -> str:
        """What ``--case`` calls it."""
        return f"{self.preset}-ragged"


@dataclass(frozen=True, kw_only=True)
class SoakCase(LoadCase):
    """The same again and again.

    Args:
        seconds: for how long.
        first: steps after which memory is looked at, to compare with what it is in the end.
    """

    seconds: float = 15.0
    first: int = 1000

    @property
    def name(self) -> str:
        """What ``--case`` calls it."""
        return f"{self.preset}-soak"


@dataclass(frozen=True, kw_only=True)
class NeighbourCase:
    """A mixer that trains on some rows.

    Args:
        mixer: what it is called.
        config: what it is made of.
        batch: B.
        length: L.
        d_model: D.
    """

    mixer: str
    config: MixerConfig
    batch: int = 8
    length: int = 2048
    d_model: int = 1024

    @property
    def name(self) -> str:
        """What ``--case`` calls it: MIXER-BxLxD."""
        return f"{self.mixer}-{self.batch}x{self.length}x{self.d_model}"


def _case(batch: int, length: int, channels: int, states: int) -> OpCase:
    return OpCase(batch=batch, length=length, channels=channels, states=states, dtype=torch.bfloat16)


_TINY = _case(1, 16, 64, 16)
_TOKENS = 2**14
_BASE = _case(8, 2048, 2048, 16)

SCAN = (
    _BASE,
    _case(2, 8192, 4096, 16),
    _case(1, 131072, 2048, 16),
    _case(1, 2048, 4096, 16),
    _case(64, 1024, 3072, 16),
    replace(_case(1, _TOKENS, 2048, 16), sequences=64),
    replace(_BASE, reverse=True),
    replace(_BASE, discretization="zoh"),
)
CONV = (_case(8, 4096, 2048, 3),)
NORM = (_case(1, _TOKENS, 2048, 0), _case(1, _TOKENS, 1024, 0))
STEP = tuple(_case(batch, 1, 4096, 16) for batch in (1, 16, 128))
HOST = (CallCase(name="tiny", scan=_TINY),)
FIRST_CALL = (CallCase(name="scan", scan=_TINY),)
BLOCKS = tuple(LengthCase(length=length, batch=_TOKENS // length) for length in (2048, 4096, 8192, 16384))
NEIGHBOURS = tuple(
    NeighbourCase(mixer=mixer, config=config)
    for mixer, config in {
        "mamba-s6": MambaConfig(),
        "mamba-s4d": MambaConfig(ssm=S4DConfig()),
        "mamba-s4": MambaConfig(ssm=S4Config()),
        "mamba-hyena": MambaConfig(ssm=HyenaFilterConfig()),
        "plain-s4": PlainConfig(),
        "h3": H3Config(),
        "hyena": HyenaConfig(),
        "retnet": RetNetConfig(),
        "rwkv": RWKVConfig(),
        "rwkv-channel": RWKVChannelConfig(),
        "attention": AttentionConfig(n_heads=16, positions="rope"),
        "gau": GAUConfig(),
        "mlp": MLPConfig(),
    }.items()
)
LENGTHS = tuple(LengthCase(length=2**power, batch=max(1, _TOKENS // 2**power)) for power in range(9, 20))
MODEL = (
    ModelCase(preset="mamba-1.4b", batch=4, length=2048),
    ModelCase(preset="mamba-370m", batch=8, length=2048),
    ModelCase(preset="mamba-130m", batch=8, length=2048),
)
DECODE = (
    *(DecodeCase(preset=preset, batch=batch) for preset in ("mamba-130m", "mamba-1.4b") for batch in (1, 8, 128)),
    DecodeCase(preset="mamba-370m", batch=1),
    ForkCase(preset="mamba-1.4b"),
)
_BATCHES = tuple((2**power, 2048) for power in range(10))
GENERATE = (
    *(PrefillCase(preset=preset, batch=8, length=2048) for preset in ("mamba-130m", "mamba-1.4b")),
    *(
        WritingCase(preset=preset, over="batch", shapes=_BATCHES, new_tokens=128)
        for preset in ("mamba-130m", "mamba-1.4b")
    ),
    WritingCase(
        preset="mamba-1.4b", over="length", shapes=tuple((1, 2**power) for power in range(9, 17)), new_tokens=32
    ),
    *(LoadCase(preset=preset) for preset in ("mamba-130m", "mamba-1.4b")),
    SoakCase(preset="mamba-130m"),
)
