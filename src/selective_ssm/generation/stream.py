"""Writing on from a prompt, one sequence at a time, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from typing import TYPE_CHECKING, overload

import torch

from selective_ssm.data.tokenizers import Tokenizer
from selective_ssm.errors import UserError
from selective_ssm.generation.sampling import Sampler, SamplingOptions
from selective_ssm.generation.text import StopGate, text_pieces
from selective_ssm.models import LanguageModel, LanguageModelOutput, ModelState

if TYPE_CHECKING:
    from typing_extensions import Unpack

PREFILL_CHUNK = 2048  # tokens of a prompt that are read at once


@overload
def generate(
    model: LanguageModel,
    prompt: str,
    *,
    tokenizer: Tokenizer,
    max_new_tokens: int = ...,
    stop: str | Sequence[str] = ...,
    state: ModelState | None = ...,
    **sampling: Unpack[SamplingOptions],
) -> Iterator[str]: ...


@overload
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = ...,
    state: ModelState | None = ...,
    **sampling: Unpack[SamplingOptions],
) -> Iterator[int]: ...


def generate(
    model: LanguageModel,
    prompt: str | Sequence[int],
    *,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 256,
    stop: str | Sequence[str] = (),
    state: ModelState | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Iterator[str] | Iterator[int]:
    """Write on from a prompt, and give out each piece as soon as it is there.

    The prompt is read in chunks, then each token is one step from the state before it, so that neither a long prompt
    nor a long answer costs memory. With a tokenizer the prompt is text, read as the beginning of a document (an empty
    one too: the tokenizer's ``end``, with which documents begin, goes before it), or as the continuation of what
    ``state`` has read. Without one, prompt and answer are ids, and nothing is added.

    Args:
        model: the language model, on any device.
        prompt: text with a tokenizer, ids without.
        tokenizer: the one the model was trained with.
        max_new_tokens: the most tokens to write; the tokenizer's ``end`` and a stop string end the text sooner.
        stop: strings that end the text, and are left out of it.
        state: what the model has read before the prompt, batch 1; it is left as it is.
        sampling: ``temperature``, ``top_k``, ``top_p``, ``min_p`` and ``seed``, as `Sampler` takes them.

    Returns:
        An iterator over pieces of text, or over ids.

    Raises:
        UserError: an empty prompt of ids, an id outside the vocabulary, or a setting out of its range.

    Example:
        >>> from selective_ssm.models import LanguageModelConfig
        >>> model = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16))
        >>> len(list(generate(model, [1, 2, 3], max_new_tokens=4)))
        4
    """
    sampler = Sampler(**sampling)
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    if tokenizer is None:
        if isinstance(prompt, str) or stop:
            raise UserError("text and stop strings need a tokenizer, and there is none: give the prompt as token ids")
        return islice(_new_ids(model, _checked(prompt, model), state, sampler), max_new_tokens)
    if not isinstance(prompt, str):
        raise UserError("with a tokenizer the prompt must be text; leave the tokenizer out to work with token ids")
    ids = ([tokenizer.end] if state is None else []) + tokenizer.encode(prompt)
    gate = StopGate((stop,) if isinstance(stop, str) else stop)
    new_ids = islice(_new_ids(model, _checked(ids, model), state, sampler, tokenizer.vocab_size), max_new_tokens)
    document = takewhile(lambda one: one != tokenizer.end, new_ids)
    return text_pieces(document, tokenizer, gate, after=ids[-1])


def _checked(ids: Sequence[int], model: LanguageModel) -> Sequence[int]:
    if not ids:
        raise UserError("the prompt is empty: give at least one token")
    last = model.config.vocab_size - 1
    outside = next((one for one in (min(ids), max(ids)) if not 0 <= one <= last), None)
    if outside is not None:
        raise UserError(f"token id {outside} is outside the model's vocabulary (0 to {last})")
    return ids


@torch.no_grad()
def _new_ids(
    model: LanguageModel, prompt: Sequence[int], state: ModelState | None, sampler: Sampler, known: int | None = None
) -> Iterator[int]:
    """Tokens without end, of the first `known` ids only: a model's vocabulary may be padded beyond its tokenizer's."""
    logits, state = prefill(model, prompt, state)
    while True:
        assert state is not None
        token = sampler(logits[..., :known], state.position)
        yield int(token)
        logits, state = model.step(token, state)


@torch.no_grad()
def prefill(model: LanguageModel, ids: Sequence[int], state: ModelState | None = None) -> LanguageModelOutput:
    """Read a prompt of any length chunk by chunk, so that only its ids take memory.

    Args:
        model: the language model.
        ids: at least one token.
        state: what the model has read before, batch 1; it is left as it is.

    Returns:
        The logits after the last token, (1, V), and the state.
    """
    device = next(model.parameters()).device
    *chunks, last = torch.tensor([ids], device=device).split(PREFILL_CHUNK, dim=1)
    for chunk in chunks:
        state = model.prefill(chunk, state).state
    return model.prefill(last, state)
