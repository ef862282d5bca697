"""What the harness gets from our class is what it gets from its own for transformers' models, for fewer tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from selective_ssm.data import ByteTokenizer, Tokenizer, TokenizersTokenizer
from selective_ssm.errors import MissingPackage, UserError
from selective_ssm.evaluation import harness_model
from selective_ssm.evaluation.local_tasks import LOCAL_SETS, local_task
from selective_ssm.models import LanguageModel, LanguageModelConfig

ROWS = 50
TEXTS = ["", "Once", "Once upon a time, there was", "The cat sat on the mat. " * 20]


class Pair(NamedTuple):
    """The same weights and tokenizer, ours and transformers'."""

    model: LanguageModel
    tokenizer: Tokenizer
    folder: Path

    def theirs(self, **options: Any) -> HFLM:
        text = PreTrainedTokenizerFast(
            tokenizer_file=str(self.folder / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
        )
        return HFLM(AutoModelForCausalLM.from_pretrained(self.folder), tokenizer=text, **options)


def pair_of(tokenizer: Tokenizer, folder: Path) -> Pair:
    """A model that has learned nothing, but takes some tokens for far likelier than others."""
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(d_model=16, n_layer=1, vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        model.embedding.weight.mul_(5)
    model.save_pretrained(folder, model_type="mamba")
    tokenizer.save(folder)
    return Pair(model.eval(), tokenizer, folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """With a vocabulary of a few hundred tokens, learned from English prose."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([sys.copyright, __doc__ or "", *TEXTS, Path(__file__).read_text()], trainer)
    return pair_of(TokenizersTokenizer(backend), tmp_path_factory.mktemp("small"))


def neox(data: Path, folder: Path) -> Pair:
    tokenizer = TokenizersTokenizer.from_file(data / "gpt_neox_tokenizer" / "20B_tokenizer.json")
    return pair_of(tokenizer, folder)


def all_of(lm: LM, tasks: list[Task]) -> dict[str, Any]:
    """What the harness finds for a model."""
    for task in tasks:
        task.set_fewshot_seed(0)
    return evaluate(lm, {"tasks": {task.task_name: task for task in tasks}}, limit=ROWS, bootstrap_iters=0)


def answers(found: dict[str, Any]) -> Iterator[tuple[float, bool]]:
    """Each log-likelihood, and whether it is of the likeliest tokens."""
    return chain.from_iterable(row["filtered_resps"] for rows in found["samples"].values() for row in rows)


def read_by(lm: HFLM) -> list[int]:
    """How many tokens their model is given, padding included, a number a pass."""
    counts: list[int] = []
    lm.model.register_forward_pre_hook(lambda _, arguments: counts.append(arguments[0].numel()))
    return counts


def assert_equal_for_fewer_tokens(pair: Pair, data: Path) -> None:
    tasks = [local_task(name, data / "zeroshot") for name in LOCAL_SETS if name != "wikitext"]
    theirs, ours = pair.theirs(batch_size=16), harness_model(pair.model, pair.tokenizer)
    counts = read_by(theirs)
    expected, found = all_of(theirs, tasks), all_of(ours, tasks)
    assert all(count["effective"] == ROWS for count in found["n-samples"].values())
    for (logprob, greedy), (their_logprob, their_greedy) in zip(answers(found), answers(expected), strict=True):
        assert logprob == pytest.approx(their_logprob, rel=1e-5, abs=1e-4)
        assert greedy == their_greedy
    for name, figures in expected["results"].items():
        reached = {metric: value for metric, value in figures.items() if metric.startswith("acc")}
        assert found["results"][name] == found["results"][name] | reached
    perplexity = [one["results"]["local_lambada_openai"]["perplexity,none"] for one in (found, expected)]
    assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-4)
    assert ours.tokens < 0.6 * sum(counts)


def test_the_six_sets_give_the_same_for_fewer_tokens(small: Pair, data: Path) -> None:
    assert_equal_for_fewer_tokens(small, data)


@pytest.mark.slow
def test_the_six_sets_give_the_same_with_the_papers_tokenizer(tmp_path: Path, data: Path) -> None:
    assert_equal_for_fewer_tokens(neox(data, tmp_path), data)


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def test_what_is_too_long_is_cut_from_the_left(small: Pair) -> None:
    requests = instances("loglikelihood", [(text, " and then some more") for text in TEXTS])
    theirs = small.theirs(batch_size=1, max_length=20).loglikelihood(requests, disable_tqdm=True)
    ours = harness_model(small.model, small.tokenizer, max_length=20).loglikelihood(requests, disable_tqdm=True)
    assert ours == [pytest.approx(pair, rel=1e-5) for pair in theirs]
    whole = harness_model(small.model, small.tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert whole[-1] != pytest.approx(ours[-1], rel=1e-5)


def test_documents_can_be_read_in_the_harness_windows(small: Pair) -> None:
    requests = instances("loglikelihood_rolling", [(text,) for text in TEXTS[1:]])
    theirs = small.theirs(batch_size=4, max_length=20).loglikelihood_rolling(requests, disable_tqdm=True)
    ours = harness_model(small.model, small.tokenizer, max_length=20, overlap=1)
    assert ours.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(theirs, rel=1e-5)


def test_windows_that_share_more_are_nearer_to_the_carried_state(small: Pair) -> None:
    (text,) = requests = instances("loglikelihood_rolling", [(TEXTS[-1],)])
    (whole,) = harness_model(small.model, small.tokenizer).loglikelihood_rolling(requests, disable_tqdm=True)
    ids = torch.tensor([[small.tokenizer.end, *small.tokenizer.encode(text.args[0])]])
    with torch.no_grad():
        logprobs = small.model(ids[:, :-1]).logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])
    assert whole == pytest.approx(logprobs.sum().item(), rel=1e-5)
    off: list[float] = []
    for overlap in (1, 15):
        lm = harness_model(small.model, small.tokenizer, max_length=20, overlap=overlap)
        off.append(abs(lm.loglikelihood_rolling(requests, disable_tqdm=True)[0] - whole))
    assert off[1] < off[0]


def test_an_empty_document_has_probability_one(small: Pair) -> None:
    requests = instances("loglikelihood_rolling", [("",), ("a",), ("",)])
    for overlap in (None, 1):
        found = harness_model(small.model, small.tokenizer, overlap=overlap).loglikelihood_rolling(requests)
        assert found[0] == found[2] == 0 > found[1]


def test_what_is_written_is_the_same(small: Pair) -> None:
    options = [{"until": ["\n\n"], "max_gen_toks": 12}, {"until": ["e", "a"], "do_sample": False, "num_beams": 1}]
    requests = instances("generate_until", [(text, one) for one in options for text in TEXTS[1:]])
    theirs = small.theirs(batch_size=1).generate_until(requests, disable_tqdm=True)
    ours = harness_model(small.model, small.tokenizer).generate_until(requests)
    assert ours == theirs
    assert len(set(ours)) > 1
    assert not any("e" in text or "a" in text for text in ours[3:])


def test_what_is_drawn_can_be_drawn_again(small: Pair) -> None:
    lm = harness_model(small.model, small.tokenizer)
    requests = instances("generate_until", [(TEXTS[2], {"until": [], "do_sample": True, "max_gen_toks": 20})] * 3)
    texts = lm.generate_until(requests)
    assert len(set(texts)) == 3
    assert lm.generate_until(requests) == texts


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_length": 0}, "max_length must be 1 or more, .* got 0"),
        ({"max_length": 65}, "no more than the model's positions, got 65"),
        ({"max_length": 8, "overlap": 9}, "overlap must be between 1 and max_length = 8, got 9"),
        ({"overlap": 0}, "overlap must be between 1 and max_length = 64, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, int], sentence: str) -> None:
    model = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=257, max_positions=64))
    with pytest.raises(UserError, match=sentence):
        harness_model(model, ByteTokenizer(), **options)


def test_requests_that_do_not_fit_are_refused(small: Pair) -> None:
    lm = harness_model(small.model, small.tokenizer, max_length=8)
    with pytest.raises(UserError, match=r"max_length must be at least \d+, the tokens of a continuation, got 8"):
        lm.loglikelihood(instances("loglikelihood", [("a", TEXTS[-1])]), disable_tqdm=True)
    with pytest.raises(UserError, match="max_gen_toks = 8 leaves no room for a context"):
        lm.generate_until(instances("generate_until", [("a", {"max_gen_toks": 8})]))
    with pytest.raises(UserError, match="option of a generation must be one of .*, got 'num_beams'"):
        lm.generate_until(instances("generate_until", [("a", {"max_gen_toks": 2, "num_beams": 4})]))


def test_without_the_package_one_is_told_which_it_is(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(MissingPackage, match=r"'lm_eval', .*: pip install 'selective-ssm\[evaluation\]'"):
        harness_model(small.model, small.tokenizer)
