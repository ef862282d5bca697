"""What is timed.

Legend: B batch, L length, D channels, N state, K conv width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How cases are timed.

    Args:
        device: where.
        rounds: how often each is timed; the median is told.
        peers: what to time beside ours: "mamba_ssm", "sdpa", "transformers", "fla" and "torch" on a GPU,
            "transformers" and "mambapy" on a CPU.
    """

    device: torch.device
    rounds: int = 5
    peers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """A call of an op; a step is one of length 1.

    Args:
        batch: B.
        length: L.
        channels: D.
        states: N of a scan, K − 1 of a convolution.
        dtype: of everything that runs along the length.
        against_loop: whether the plain loop over time is timed beside it, where that is bearable.
        sequences: into how many of mixed length the row of a scan is cut; 0 for one, uncut.
        reverse: whether a scan runs from the last token to the first.
        discretization: of a scan.
    """

    batch: int
    length: int
    channels: int
    states: int
    dtype: torch.dtype = torch.float32
    against_loop: bool = False
    sequences: int = 0
    reverse: bool = False
    discretization: Literal["euler", "zoh"] = "euler"

    @property
    def elements(self) -> int:
        """B·L·D."""
        return self.batch * self.length * self.channels

    @property
    def name(self) -> str:
        """What ``--case`` calls it: BxLxDxN, and what is special about it."""
        special = {f"packed{self.sequences}": self.sequences, "reverse": self.reverse}
        special["zoh"] = self.discretization == "zoh"
        sizes = f"{self.batch}x{self.length}x{self.channels}x{self.states}"
        return "-".join([sizes, *(name for name, is_so in special.items() if is_so)])


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """A preset that trains on, reads and writes some tokens.

    Args:
        preset: its name.
        batch: B.
        length: L of a row in training and of a prompt.
        new_tokens: how many tokens are written.
    """

    preset: str
    batch: int
    length: int
    new_tokens: int = 16

    @property
    def name(self) -> str:
        """What ``--case`` calls it: PRESET-BxL."""
        return f"{self.preset}-{self.batch}x{self.length}"


@dataclass(frozen=True, kw_only=True)
class WritingCase:
    """Prompts of several shapes that are read and gone on with, each by itself.

    Args:
        preset: the model's name.
        over: what differs from shape to shape.
        shapes: (B, L) of the prompts.
        new_tokens: how many are written after each.
        dtype: of the parameters.
        read_at_once: tokens of prompts that ours reads at once.
        seconds: that a figure's rounds may take; slower calls are timed less often, once at least.
        patience: seconds; whoever takes longer is not asked for more.
    """

    preset: str
    over: Literal["batch", "length"]
    shapes: tuple[tuple[int, int], ...]
    new_tokens: int
    dtype: torch.dtype = torch.bfloat16
    read_at_once: int = 2**14
    seconds: float = 1.0
    patience: float = 10.0

    @property
    def name(self) -> str:
        """What ``--case`` calls it."""
        return f"{self.preset}-{self.over}"


def _op_cases(*shapes: tuple[int, int, int, int], against_loop: bool = False) -> tuple[OpCase, ...]:
    return tuple(
        OpCase(batch=batch, length=length, channels=channels, states=states, against_loop=against_loop)
        for batch, length, channels, states in shapes
    )


SCAN = (
    *_op_cases((1, 2048, 64, 16), (2, 512, 256, 16), (1, 1024, 1536, 16), against_loop=True),
    *_op_cases((4, 2048, 512, 16), (1, 16384, 256, 16)),
)
CONV = _op_cases((1, 2048, 64, 3), (2, 512, 256, 3), (1, 1024, 1536, 3), (4, 2048, 512, 3))
STEP = _op_cases((1, 1, 1536, 16), (1, 1, 4096, 16), (16, 1, 1536, 16), (128, 1, 1536, 16))
MODEL = (
    ModelCase(preset="mamba-130m", batch=1, length=256),
    ModelCase(preset="mamba-370m", batch=1, length=256),
)


def scan_inputs(case: OpCase, device: torch.device) -> dict[str, Tensor]:
    """Arguments of `selective_scan` as a freshly initialised model makes them, seeded; of a step without L.

    Returns:
        u, delta, z (B, L, D); A (D, N); B, C (B, L, N); D, delta_bias (D,).
    """
    random = torch.Generator(device).manual_seed(0)
    leading = (case.batch,) if case.length == 1 else (case.batch, case.length)

    def normal(width: int) -> Tensor:
        return torch.randn(*leading, width, generator=random, device=device, dtype=case.dtype)

    u, delta, z = (normal(case.channels) for _ in range(3))
    b, c = (normal(case.states) for _ in range(2))
    a = -torch.arange(1.0, case.states + 1, device=device).repeat(case.channels, 1)
    bias = torch.full((case.channels,), -4.6, device=device)  # softplus gives 0.01
    skip = torch.ones(case.channels, device=device)
    return {"u": u, "delta": delta, "A": a, "B": b, "C": c, "D": skip, "z": z, "delta_bias": bias}


def scan_options(case: OpCase, device: torch.device) -> dict[str, Any]:
    """The other arguments of `selective_scan`; where a row is cut, always at the same places."""
    options: dict[str, Any] = {"delta_softplus": True, "reverse": case.reverse, "discretization": case.discretization}
    if case.sequences:
        random = torch.Generator().manual_seed(0)
        cuts = 1 + torch.randperm(case.length - 1, generator=random)[: case.sequences - 1].sort().values
        options["cu_seqlens"] = torch.cat([torch.tensor([0]), cuts, torch.tensor([case.length])]).int().to(device)
    return options


def conv_inputs(case: OpCase, device: torch.device) -> dict[str, Tensor]:
    """Arguments of `causal_conv1d`, seeded.

    Returns:
        x (B, L, D); weight (D, K); bias (D,).
    """
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device, dtype=case.dtype)

    return {
        "x": normal(case.batch, case.length, case.channels),
        "weight": normal(case.channels, case.states + 1),
        "bias": torch.zeros(case.channels, device=device, dtype=case.dtype),
    }
