"""Writing on from prompts: the same as the full forward, chunk by chunk, seeded, ended where asked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import pytest
import torch
from torch import Tensor

from selective_ssm.data import ByteTokenizer
from selective_ssm.errors import UserError
from selective_ssm.generation import Bookmark, Engine, Sampling, generate, slots, stream
from selective_ssm.models import LanguageModel, LanguageModelConfig
from tests.generation.oracle import drawn_with_margin, shared_model, untrained_model, written_alone

BYTES = ByteTokenizer()
SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(seed=5, top_k=50, top_p=0.95, min_p=0.001),
    Sampling(seed=-1, temperature=0.75, repetition_penalty=1.5),
]


@pytest.fixture
def dictated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the model write what the test wants; gives back what of it was not asked for yet."""

    def dictate(answer: bytes | list[int]) -> Iterator[int]:
        answers = iter(answer)

        def sample(logits: Tensor, *_: object) -> tuple[Tensor, None]:
            return torch.tensor([next(answers)] * len(logits)), None

        monkeypatch.setattr(slots, "sample", sample)
        return answers

    return dictate


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "cut", "penalised"])
def test_tokens_are_those_of_the_full_forward(sampling: Sampling) -> None:
    expected = written_alone(shared_model(), [1, 2, 3], 20, sampling)
    assert len(set(expected)) > 3
    assert list(stream(shared_model(), [1, 2, 3], max_new_tokens=20, **vars(sampling))) == expected


def test_every_row_of_a_ragged_batch_is_that_prompt_alone() -> None:
    """Each with settings of its own, and rows that come and go, since there are fewer places than prompts."""
    prompts = [torch.randint(257, (length,)).tolist() for length in (1, 9, 30, 2, 1, 17, 5, 50, 3)]
    samplings = [SAMPLINGS[row % 3] for row in range(len(prompts))]
    options: dict[str, Any] = {name: [vars(one)[name] for one in samplings] for name in vars(samplings[0])}
    expected = [written_alone(shared_model(), *row) for row in zip(prompts, [12] * 9, samplings, strict=True)]
    for batch in (2, 4, 9):
        found = generate(shared_model(), prompts, max_new_tokens=12, batch=batch, **options)
        assert [one.ids for one in found] == expected
        assert [one.prompt_tokens for one in found] == list(map(len, prompts))


def test_in_fp32_a_batch_may_differ_at_a_near_tie_only(record_property: Any) -> None:
    torch.manual_seed(3)
    model = untrained_model().float()
    exact = untrained_model()
    exact.load_state_dict(model.state_dict())
    prompts = [torch.randint(257, (length % 40 + 1,)).tolist() for length in range(0, 24 * 7, 7)]
    seeds = list(range(24))
    together = generate(model, prompts, max_new_tokens=40, top_p=0.9, seed=seeds)
    differing = 0
    for prompt, seed, one in zip(prompts, seeds, together, strict=True):
        alone = list(stream(model, prompt, max_new_tokens=40, top_p=0.9, seed=seed))
        if (shared := shared_length(one.ids, alone)) < 40:
            differing += 1
            assert margin(exact, [*prompt, *alone[:shared]], Sampling(top_p=0.9, seed=seed)) < 1e-4
    record_property("rows that differ at a near-tie", differing)
    assert margin(exact, prompts[0], Sampling(temperature=0)) > 1e-4, "most choices are none between near equals"


def shared_length(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=True)))


@torch.no_grad()
def margin(model: LanguageModel, ids: list[int], sampling: Sampling) -> float:
    logits = model(torch.tensor([ids])).logits[0, -1].tolist()
    return drawn_with_margin(logits, sampling, len(ids), set(ids))[1]


def test_a_prompt_that_comes_often_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = shared_model(), torch.randint(257, (20,)).tolist()
    expected = [list(stream(model, prompt, max_new_tokens=6, seed=seed)) for seed in range(5)]
    read: list[int] = []
    hidden = type(model).hidden

    def watched(self: LanguageModel, ids: Tensor, *arguments: Any, **options: Any) -> Any:
        read.append(ids.shape[1])
        return hidden(self, ids, *arguments, **options)

    monkeypatch.setattr(type(model), "hidden", watched)
    found = generate(model, [prompt] * 5, max_new_tokens=6, seed=range(5), batch=3)
    assert [one.ids for one in found] == expected
    assert read == [19], "the last token is left to the first step"
    assert [(one.prompt_tokens, one.cached_tokens) for one in found] == [(20, 0)] + [(20, 19)] * 4


def test_a_text_can_be_cut_anywhere_and_gone_on_with() -> None:
    model = shared_model()
    whole = list(stream(model, [7, 8], max_new_tokens=12, seed=1))
    (first,) = generate(model, [7, 8], max_new_tokens=5, seed=1, keep_state=True)
    assert isinstance(first.state, Bookmark)
    kept = first.state.state.clone()
    for rest in (
        stream(model, [], max_new_tokens=7, state=first.state),
        iter(generate(model, [[]], max_new_tokens=7, state=first.state)[0].ids),
    ):
        assert first.ids + list(rest) == whole
    assert all(torch.equal(x, kept.tensors()[name]) for name, x in first.state.state.tensors().items())
    added = list(stream(model, [9, 9], max_new_tokens=7, state=first.state))
    assert added == list(stream(model, [7, 8, *first.ids, 9, 9], max_new_tokens=7, seed=1))


def test_the_seed_decides(model: LanguageModel) -> None:
    first, again, other = (list(stream(model, [1], max_new_tokens=30, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_single_prompt_is_a_list_of_one(model: LanguageModel) -> None:
    (ids,) = generate(model, [1, 2], max_new_tokens=3)
    (text,) = generate(model, "ab", tokenizer=BYTES, max_new_tokens=3)
    assert ids.text is None
    assert text.text is not None
    assert generate(model, []) == []


def test_log_probabilities_are_those_of_the_full_forward() -> None:
    model, prompt = shared_model(), [3, 1, 4]
    (one,) = generate(model, prompt, max_new_tokens=5, temperature=0.5, top_k=3, repetition_penalty=2.0, logprobs=True)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + one.ids])).logits[0, 2:-1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(one.ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(one.logprobs, dtype=torch.float64), expected, rtol=1e-9, atol=1e-9)
    assert generate(model, prompt, max_new_tokens=1)[0].logprobs is None


def test_text_begins_a_document(model: LanguageModel) -> None:
    """So an empty prompt is allowed: the boundary is what the model reads then."""
    for prompt in ("", "añ"):
        ids = stream(model, [BYTES.end, *BYTES.encode(prompt)], max_new_tokens=30, seed=3)
        expected = BYTES.decode(takewhile(lambda one: one != BYTES.end, ids)).decode("utf-8", "replace")
        assert len(expected) > 10
        assert "".join(stream(model, prompt, tokenizer=BYTES, max_new_tokens=30, seed=3)) == expected
        assert generate(model, prompt, tokenizer=BYTES, max_new_tokens=30, seed=3)[0].text == expected


def test_the_end_of_the_document_ends_the_text(model: LanguageModel, dictated: Any) -> None:
    rest = dictated([*b"ab", BYTES.end, *b"cd"])
    assert list(stream(model, "x", tokenizer=BYTES)) == ["a", "b"]
    assert next(rest) == ord("c")
    dictated([*b"ab", BYTES.end])
    (one,) = generate(model, "x", tokenizer=BYTES)
    assert (one.ids, one.text, one.finish) == ([*b"ab", BYTES.end], "ab", "end")


def test_a_stop_id_ends_the_text_and_is_no_part_of_it(model: LanguageModel, dictated: Any) -> None:
    dictated(b"ab.c")
    (one,) = generate(model, "x", tokenizer=BYTES, stop_ids=[ord(".")])
    assert (one.ids, one.text, one.finish) == ([*b"ab."], "ab", "end")
    dictated(b"ab.c")
    assert list(stream(model, [1], stop_ids=[ord(".")])) == [*b"ab."]


def test_a_stop_string_ends_the_text(model: LanguageModel, dictated: Any) -> None:
    rest = dictated(b"one\n\ntwo")
    assert "".join(stream(model, "x", tokenizer=BYTES, stop="\n\n")) == "one"
    assert next(rest) == ord("t")
    dictated(b"one\n\ntwo")
    (one,) = generate(model, "x", tokenizer=BYTES, stop=["!", "\n\n"])
    assert (one.ids, one.text, one.finish) == ([*b"one\n\n"], "one", "stop")


def test_what_might_have_been_a_stop_string_is_given_out_in_the_end(model: LanguageModel, dictated: Any) -> None:
    dictated("one\n€".encode()[:-1])
    (one,) = generate(model, "x", tokenizer=BYTES, stop="\n\n", max_new_tokens=6)
    assert (one.text, one.finish) == ("one\n\ufffd", "length")


def test_no_tokens_are_written_where_none_are_asked_for(model: LanguageModel) -> None:
    assert list(stream(model, [1, 2], max_new_tokens=0)) == []
    (one,) = generate(model, [1, 2], max_new_tokens=0, keep_state=True)
    assert (one.ids, one.finish) == ([], "length")
    assert list(stream(model, [], max_new_tokens=5, state=one.state)) == list(stream(model, [1, 2], max_new_tokens=5))


def test_only_ids_of_the_tokenizer_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A released model's vocabulary is padded beyond its tokenizer's."""
    padded = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=300))
    monkeypatch.setattr(slots, "sample", lambda logits, *_: (torch.tensor([logits.shape[-1] - 2]), None))
    assert generate(padded, [1], tokenizer=BYTES, max_new_tokens=4)[0].ids == [255] * 4
    assert list(stream(padded, [1], max_new_tokens=1)) == [298]


def test_gradients_are_off_inside_only(model: LanguageModel) -> None:
    for _ in stream(model, [1], max_new_tokens=2):
        assert torch.is_grad_enabled()


def test_inference_mode_around_it_leaves_states_that_can_be_used_anywhere(model: LanguageModel) -> None:
    with torch.inference_mode():
        (one,) = generate(model, [1, 2], max_new_tokens=2, keep_state=True)
    assert one.state is not None
    assert list(stream(model, [], state=one.state, max_new_tokens=3))
    model.step(torch.tensor([1]), one.state.state)


def test_ids_may_come_as_arrays(model: LanguageModel) -> None:
    (expected,) = generate(model, [1, 2], max_new_tokens=3)
    rows = torch.tensor([[1, 2], [1, 2]])
    for prompts in (rows, rows.numpy(), rows[0], rows[0].numpy(), list(rows.numpy()), list(rows[0].numpy())):
        assert generate(model, prompts, max_new_tokens=3)[0].ids == expected.ids
    for prompts in ([1.5, 2.0], 7, torch.tensor([1.0, 2.0])):
        with pytest.raises(UserError, match="must be"):
            generate(model, prompts, max_new_tokens=3)


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        ([], {}, "the prompt is empty"),
        ([257], {}, "token id 257 is outside"),
        ([3, -1], {}, "token id -1 is outside"),
        ([3.5], {}, "a prompt of ids must be whole numbers"),
        ("text", {}, "need a tokenizer"),
        ([1], {"stop": "x"}, "need a tokenizer"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens must be 0 or more"),
        ([1], {"top_p": 0}, "top_p must be above 0"),
        ("x", {"tokenizer": BYTES, "stop": ""}, "a stop string must not be empty"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    model: LanguageModel, prompt: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        stream(model, prompt, **options)


def test_as_many_values_as_prompts_are_asked_for(model: LanguageModel) -> None:
    with pytest.raises(UserError, match="batch must be 1 or more, got 0"):
        generate(model, [[1]], batch=0)
    with pytest.raises(UserError, match="seed has 2 values for 3 prompts"):
        generate(model, [[1]] * 3, seed=[1, 2])


def test_what_was_given_out_is_forgotten_and_the_state_does_not_grow(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    step = model.step

    def watched(ids: Tensor, state: Any, **options: Any) -> Any:
        assert ids.shape == (1,)
        sizes.append(state.nbytes)
        return step(ids, state, **options)

    monkeypatch.setattr(model, "step", watched)
    engine = Engine(model, slots=1)
    request = engine.submit([1], max_new_tokens=50)
    assert len(list(request.items(forget=True))) == 50
    assert request.result().ids == []
    assert set(sizes) == {model.init_state(2).nbytes}, "a slot, and one for padding"
    assert len(sizes) == 50
