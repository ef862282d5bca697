"""Those who read prompts and write on, ours and others, all greedily.

Legend: B batch, L length of the prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from selective_ssm.bench import engines, huggingface, mamba_ssm
from selective_ssm.bench.cases import Setup, WritingCase
from selective_ssm.bench.contenders import Contender, absent, imported
from selective_ssm.bench.run import fresh
from selective_ssm.generation import Engine
from selective_ssm.models import LanguageModelConfig

OURS, TRANSFORMER, LOOP = "ours", "transformers, GPT-NeoX", "transformers, Mamba"

_LOOP_TOKENS = 2048  # of prompts, which it reads in a loop of Python


class Writer(Protocol):
    """One who writes."""

    most_tokens: int | None
    """Of prompts, of which more would take too long."""

    @property
    def parameters(self) -> int:
        """How many its model has."""
        ...

    def take(self, prompts: Tensor, new_tokens: int) -> None:
        """Take prompts (B, L), and do beforehand what is to be done once for as many new tokens or fewer."""
        ...

    def write(self, new_tokens: int) -> None:
        """Read the prompts from their beginning, and write so many tokens after each."""
        ...


def contenders(case: WritingCase, config: LanguageModelConfig, setup: Setup) -> Iterator[Contender]:
    """Ours, and the peers that are asked for; each call makes a `Writer`.

    Args:
        case: what is to be written.
        config: of our model; the others' are of its size.
        setup: where, and which peers.
    """
    where = (setup.device, case.dtype)
    yield Contender(OURS, partial(Ours, config, *where, case.read_at_once), [])
    if "mamba_ssm" in setup.peers:
        yield released(config, *where)
    if "transformers" in setup.peers:
        transformers = imported("transformers")
        if transformers is None:
            yield from (absent(who) for who in (TRANSFORMER, LOOP))
            return
        longest = max(length for _, length in case.shapes) + case.new_tokens
        transformer = partial(huggingface.transformer, transformers, config, longest)
        yield Contender(TRANSFORMER, partial(HuggingFace, transformer, *where), [])
        loop = partial(huggingface.mamba, transformers, config)
        yield Contender(LOOP, partial(HuggingFace, loop, *where, _LOOP_TOKENS), [])


def released(config: LanguageModelConfig, device: torch.device, dtype: torch.dtype) -> Contender:
    """mamba_ssm's language model, writing from CUDA graphs."""
    if imported("mamba_ssm") is None:
        return absent("mamba_ssm")
    return Contender("mamba_ssm", partial(MambaSSM, config, device, dtype), [])


class Ours:
    """An engine with a slot for every prompt."""

    most_tokens: int | None = None

    def __init__(
        self, config: LanguageModelConfig, device: torch.device, dtype: torch.dtype, read_at_once: int
    ) -> None:
        self._model = fresh(config, device, dtype)
        self._read_at_once = read_at_once

    @property
    def parameters(self) -> int:
        return _size(self._model)

    def take(self, prompts: Tensor, new_tokens: int) -> None:
        self._prompts = prompts.tolist()
        self._engine = Engine(self._model, slots=len(prompts), prefill_budget=self._read_at_once)
        self.write(new_tokens)  # makes the graphs, and no others

    def write(self, new_tokens: int) -> None:
        engines.serve(self._engine, [(prompt, new_tokens) for prompt in self._prompts])


class HuggingFace:
    """A model of transformers, with the cache that its `generate` takes by default."""

    def __init__(
        self, make: partial[Any], device: torch.device, dtype: torch.dtype, most_tokens: int | None = None
    ) -> None:
        self.most_tokens = most_tokens
        with device:
            self._model: Any = make().to(dtype).eval()
        self._model.generation_config.eos_token_id = None  # so that no text ends sooner

    @property
    def parameters(self) -> int:
        return _size(self._model)

    def take(self, prompts: Tensor, new_tokens: int) -> None:
        self._prompts = prompts[:, :8]
        self.write(2)
        self._prompts = prompts

    @torch.no_grad()
    def write(self, new_tokens: int) -> None:
        mask = torch.ones_like(self._prompts)
        self._model.generate(
            self._prompts, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )


class MambaSSM:
    """The released model."""

    most_tokens: int | None = None

    def __init__(self, config: LanguageModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._model: Any = mamba_ssm.language_model(config, device, dtype)
        self._model.eval()

    @property
    def parameters(self) -> int:
        return _size(self._model)

    def take(self, prompts: Tensor, new_tokens: int) -> None:
        self._prompts = prompts
        self.write(new_tokens)  # makes the graph, of which shorter texts make use too

    @torch.no_grad()
    def write(self, new_tokens: int) -> None:
        length = self._prompts.shape[1] + new_tokens
        self._model.generate(self._prompts, max_length=length, cg=self._prompts.is_cuda)


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
