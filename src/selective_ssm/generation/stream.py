"""Writing on from prompts: one text as it comes, or many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, cast, overload

from selective_ssm.data.tokenizers import Tokenizer
from selective_ssm.errors import UserError
from selective_ssm.generation.bookmarks import Bookmark
from selective_ssm.generation.engine import Engine
from selective_ssm.generation.request import Completion
from selective_ssm.generation.sampling import SamplingOptions
from selective_ssm.models import LanguageModel

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RowOptions(TypedDict, total=False):
    """What `Sampling` takes, each option for all rows or one a row."""

    temperature: float | Sequence[float]
    top_k: int | Sequence[int]
    top_p: float | Sequence[float]
    min_p: float | Sequence[float]
    repetition_penalty: float | Sequence[float]
    seed: int | Sequence[int]


@overload
def stream(
    model: LanguageModel,
    prompt: str | Sequence[int],
    *,
    tokenizer: Tokenizer,
    max_new_tokens: int = ...,
    stop: str | Sequence[str] = ...,
    stop_ids: Sequence[int] = ...,
    state: Bookmark | None = ...,
    **sampling: Unpack[SamplingOptions],
) -> Iterator[str]: ...


@overload
def stream(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = ...,
    stop_ids: Sequence[int] = ...,
    state: Bookmark | None = ...,
    **sampling: Unpack[SamplingOptions],
) -> Iterator[int]: ...


def stream(
    model: LanguageModel,
    prompt: str | Sequence[int],
    *,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 256,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    state: Bookmark | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Iterator[str] | Iterator[int]:
    """Write on from a prompt, and give out each piece as soon as it is there.

    The prompt is read in chunks, then each token is one step from the state before it, and what was given out is
    forgotten, so that neither a long prompt nor a long answer costs memory.

    Args:
        model: the language model, on any device.
        prompt: text, where there is a tokenizer, or ids; as in `Engine.submit`.
        tokenizer: the one the model was trained with.
        max_new_tokens: the most tokens to write; the tokenizer's ``end`` and a stop string end the text sooner.
        stop: strings that end the text, and are left out of it.
        stop_ids: ids that end the text.
        state: where another text stopped, to go on from there.
        sampling: ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty`` and ``seed``, as `Sampling`
            takes them.

    Returns:
        An iterator over pieces of text, or without a tokenizer over ids.

    Raises:
        UserError: what `Engine.submit` says, at once.

    Example:
        >>> from selective_ssm.models import LanguageModelConfig
        >>> model = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16))
        >>> len(list(stream(model, [1, 2, 3], max_new_tokens=4)))
        4
    """
    request = Engine(model, tokenizer, slots=1).submit(
        prompt, max_new_tokens=max_new_tokens, stop=stop, stop_ids=stop_ids, state=state, **sampling
    )
    return request.items(forget=True)


def generate(
    model: LanguageModel,
    prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    *,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 256,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    logprobs: bool = False,
    keep_state: bool = False,
    state: Bookmark | None = None,
    batch: int = 8,
    **sampling: Unpack[RowOptions],
) -> list[Completion]:
    """Write on from any mix of prompts, many at once; what comes of each is what would come of it alone.

    A prompt that is there several times in a row, with several seeds say, is read once.

    Args:
        model: the language model, on any device.
        prompts: texts, where there is a tokenizer, or lists of ids; a single one is a list of one.
        tokenizer: the one the model was trained with.
        max_new_tokens: the most tokens to write after each.
        stop: strings that end a text, and are left out of it.
        stop_ids: ids that end a text.
        logprobs: whether the tokens' log-probabilities are wanted.
        keep_state: whether a bookmark of each text's end is wanted.
        state: where another text stopped, from which all go on.
        batch: how many are read and written side by side; a GPU takes many more for the same time.
        sampling: as in `stream`, each option for all prompts or one a prompt.

    Returns:
        What was written after each prompt, in their order.

    Raises:
        UserError: what `Engine.submit` says, or not as many of an option as there are prompts.

    Example:
        >>> from selective_ssm.models import LanguageModelConfig
        >>> model = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16))
        >>> [len(one.ids) for one in generate(model, [[1, 2, 3], [4]], max_new_tokens=5, seed=[1, 2])]
        [5, 5]
    """
    rows = _rows(prompts)
    options = [_options(sampling, row, len(rows)) for row in range(len(rows))]
    engine = engine_for(rows, model, tokenizer, batch)
    wishes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": stop, "stop_ids": stop_ids}
    wishes |= {"logprobs": logprobs, "keep_state": keep_state, "state": state}
    requests = [engine.submit(row, **wishes, **option) for row, option in zip(rows, options, strict=True)]
    return [request.result() for request in requests]


def engine_for(
    prompts: Sequence[str | Sequence[int]], model: LanguageModel, tokenizer: Tokenizer | None, batch: int
) -> Engine:
    """An engine with slots for so many texts, or all; a prompt that is there several times in a row is read once."""
    if batch < 1:
        raise UserError(f"batch must be 1 or more, got {batch}")
    slots = min(batch, len(prompts) or 1)
    is_shared = len({one if isinstance(one, str) else tuple(one) for one in prompts}) < len(prompts)
    prefix_bytes = (slots + 1) * model.init_state(1).nbytes if is_shared else 0
    return Engine(model, tokenizer, slots=slots, prefix_bytes=prefix_bytes)


def _rows(prompts: str | Sequence[Any]) -> list[str | list[int]]:
    """The prompts as a list, of one if they are one."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        if len(prompts) and _is_id(prompts[0]):
            return [list(prompts)]
        return [row if isinstance(row, str) else list(row) for row in prompts]
    except TypeError as error:
        raise UserError(f"prompts must be texts, or lists of ids: {error}") from error


def _is_id(one: object) -> bool:
    return hasattr(one, "__index__") and getattr(one, "ndim", 0) == 0


def _options(sampling: RowOptions, row: int, rows: int) -> SamplingOptions:
    """The options of one row."""
    own: dict[str, Any] = {}
    for name, value in sampling.items():
        if isinstance(value, Sequence) and len(value) != rows:
            raise UserError(f"{name} has {len(value)} values for {rows} prompts: give one for each, or one for all")
        own[name] = value[row] if isinstance(value, Sequence) else value
    return cast("SamplingOptions", own)
