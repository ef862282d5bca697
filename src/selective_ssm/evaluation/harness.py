"""A language model of ours as the ``LM`` of EleutherAI's evaluation harness, the package ``lm_eval``."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from selective_ssm.data.tokenizers import Tokenizer
from selective_ssm.errors import UserError, choice, require
from selective_ssm.evaluation.continuations import Scores, score_continuations
from selective_ssm.generation import Engine, Request
from selective_ssm.models import LanguageModel

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM

MAX_LENGTH = 2048
"""What the harness takes for the longest text of a model that names none, as Mamba does not."""
_MAX_NEW_TOKENS = 256  # the harness's own default
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


def harness_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    overlap: int | None = None,
    chunk: int = 2048,
    batch: int = 64,
) -> TemplateLM:
    """Wrap a model for ``lm_eval.evaluate``: the answers of the harness's ``hf`` class, for fewer tokens.

    Texts are cut into context and continuation by the harness's own ``_encode_pair``, and no boundary is set before
    them. What the texts of a call begin with in common is read once, and nothing is padded: see `score_continuations`.

    Args:
        model: the language model, on any device.
        tokenizer: the one the model was trained with.
        max_length: the most tokens of a text that are read; of a longer one the last, as ``hf`` does. By default 2048,
            which ``hf`` takes for Mamba, or the model's positions.
        overlap: for the perplexity of documents, how many tokens each window of `max_length` has in common with the
            one before, at least: 1 is what ``hf`` does. None reads each document whole, its state carried along.
        chunk: as in `score_continuations`.
        batch: how many texts are read, or written, side by side.

    Returns:
        The model as the harness wants it. Its attribute ``tokens`` counts the tokens read for log-likelihoods.

    Raises:
        MissingPackage: ``lm_eval`` is not installed.
        UserError: `max_length` or `overlap` are out of their range.
    """
    base = require("lm_eval.api.model", extra="evaluation").TemplateLM
    made = types.new_class("SelectiveSSM", (_Answers, base))
    return made(model, tokenizer, max_length=max_length, overlap=overlap, chunk=chunk, batch=batch)


class _Answers:
    """What a harness's model does its own way; the rest comes from the harness's ``TemplateLM``."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        max_length: int | None,
        overlap: int | None,
        chunk: int,
        batch: int,
    ) -> None:
        super().__init__()
        longest = model.config.max_positions or math.inf
        self.max_length = int(min(MAX_LENGTH, longest)) if max_length is None else max_length
        if not 1 <= self.max_length <= longest:
            raise UserError(f"max_length must be 1 or more, and no more than the model's positions, got {max_length}")
        if overlap is not None and not 1 <= overlap <= self.max_length:
            raise UserError(f"overlap must be between 1 and max_length = {self.max_length}, got {overlap}")
        self._model, self._tokenizer = model, tokenizer
        self._overlap, self._chunk, self._batch = overlap, chunk, batch
        self.tokens = 0

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; boundaries are never added."""
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._truncated(context, continuation) for _, context, continuation in requests]
        scores = self._scores(pairs, disable_tqdm)
        return list(zip(scores.logprobs, scores.greedy, strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole documents, each after a boundary."""
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows = self._windows(self.tok_encode(request.args[0]))
            pairs += windows
            owners += [owner] * len(windows)
        totals = [0.0] * len(requests)
        for owner, logprob in zip(owners, self._scores(pairs, disable_tqdm).logprobs, strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string or its own end."""
        engine = Engine(self._model, self._tokenizer, slots=max(1, min(self._batch, len(requests))))
        waiting: list[Request] = []
        for seed, request in enumerate(requests):
            context, options = cast("tuple[str, dict[str, Any]]", request.args)
            wishes = _wishes(options)
            prompt = self._prompt(context, room=wishes["max_new_tokens"])
            waiting.append(engine.submit(prompt, seed=seed, **wishes))
        return [one.result().text or "" for one in waiting]

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool) -> Scores:
        """Score pairs, and show how far it is."""
        tqdm = require("tqdm", extra="evaluation").tqdm
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            scores = score_continuations(self._model, pairs, chunk=self._chunk, batch=self._batch, on_done=bar.update)
        self.tokens += scores.tokens
        return scores

    def _truncated(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """A pair with as much of its context's end as `max_length` tokens allow, the last one of all not being read."""
        kept = self.max_length + 1 - len(continuation)
        if kept < 1:
            raise UserError(
                f"max_length must be at least {len(continuation)}, the tokens of a continuation, got {self.max_length}"
            )
        return context[-kept:], continuation

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """A document in pairs that predict each of its tokens once."""
        if self._overlap is None:
            return [([self.eot_token_id], ids)] if ids else []
        utils = require("lm_eval.utils", extra="evaluation")
        windows = utils.get_rolling_token_windows(
            token_list=ids, prefix_token=self.eot_token_id, max_seq_len=self.max_length, context_len=self._overlap
        )
        return [utils.make_disjoint_window(window) for window in windows]

    def _prompt(self, context: str, room: int) -> list[int]:
        """The last tokens of a context, with room for an answer."""
        kept = self.max_length - room
        if kept < 1:
            raise UserError(f"max_gen_toks = {room} leaves no room for a context: max_length is {self.max_length}")
        return self.tok_encode(context)[-kept:] or [self.eot_token_id]


def _wishes(options: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's options of a generation, as an engine takes them."""
    known = require("lm_eval.models.utils", extra="evaluation").normalize_gen_kwargs(dict(options), _MAX_NEW_TOKENS)
    draws = known.pop("do_sample")
    wishes = {"max_new_tokens": known.pop("max_gen_toks"), "stop": [stop for stop in known.pop("until") if stop]}
    temperature = known.pop("temperature", 1.0)
    wishes["temperature"] = temperature if draws else 0.0
    if known.get("num_beams") == 1:  # some tasks say so: one beam is what is written here
        del known["num_beams"]
    for name in known:
        choice("option of a generation", name, _SAMPLING)
    return wishes | known
