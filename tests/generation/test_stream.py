"""Writing on from a prompt: the same as the full forward, chunk by chunk, seeded, ended where asked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import pytest
import torch
from torch import Tensor

from selective_ssm.data import ByteTokenizer
from selective_ssm.errors import UserError
from selective_ssm.generation import Sampler, generate, stream
from selective_ssm.models import LanguageModel, LanguageModelConfig, ModelState

BYTES = ByteTokenizer()


def written_by_full_forward(model: LanguageModel, ids: Sequence[int], count: int, sampler: Sampler) -> list[int]:
    """The oracle: read everything anew for each token."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[:, -1]
        ids.append(int(sampler(logits, torch.tensor([len(ids)]))))
    return ids[-count:]


@pytest.mark.parametrize("sampler", [Sampler(temperature=0), Sampler(seed=5, top_k=50, top_p=0.95, min_p=0.001)])
def test_tokens_are_those_of_the_full_forward(model: LanguageModel, sampler: Sampler) -> None:
    expected = written_by_full_forward(model, [1, 2, 3], 20, sampler)
    assert len(set(expected)) > 3
    assert list(generate(model, [1, 2, 3], max_new_tokens=20, **vars(sampler))) == expected


def test_a_prompt_in_chunks_is_the_prompt_at_once(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = torch.randint(257, (50,)).tolist()
    at_once = stream.prefill(model, prompt)
    monkeypatch.setattr(stream, "PREFILL_CHUNK", 7)
    lengths: list[int] = []
    forward = model.forward

    def watched(ids: Tensor, *arguments: Any, **options: Any) -> Any:
        lengths.append(ids.shape[1])
        return forward(ids, *arguments, **options)

    monkeypatch.setattr(model, "forward", watched)
    in_chunks = stream.prefill(model, prompt)
    assert lengths == [7] * 7 + [1]
    torch.testing.assert_close(in_chunks.logits, at_once.logits, rtol=1e-9, atol=1e-9)


def test_a_text_can_be_cut_anywhere_and_gone_on_with(model: LanguageModel) -> None:
    whole = list(generate(model, [7, 8], max_new_tokens=12, seed=1))
    before = stream.prefill(model, [7, 8, *whole[:4]])
    kept = {name: tensor.clone() for name, tensor in before.state.tensors().items()}
    rest = list(generate(model, whole[4:5], max_new_tokens=7, seed=1, state=before.state))
    assert rest == whole[5:]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.state.tensors().items())


def test_the_seed_decides(model: LanguageModel) -> None:
    first, again, other = (list(generate(model, [1], max_new_tokens=30, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_text_begins_a_document(model: LanguageModel) -> None:
    """So an empty prompt is allowed: the boundary is what the model reads then."""
    for prompt in ("", "añ"):
        ids = generate(model, [BYTES.end, *BYTES.encode(prompt)], max_new_tokens=30, seed=3)
        expected = BYTES.decode(takewhile(lambda one: one != BYTES.end, ids)).decode("utf-8", "replace")
        assert len(expected) > 10
        assert "".join(generate(model, prompt, tokenizer=BYTES, max_new_tokens=30, seed=3)) == expected


def test_the_end_of_the_document_ends_the_text(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([*b"ab", BYTES.end, *b"cd"])
    monkeypatch.setattr(Sampler, "__call__", lambda *_: torch.tensor([next(answers)]))
    assert list(generate(model, "x", tokenizer=BYTES)) == ["a", "b"]
    assert next(answers) == ord("c")


def test_a_stop_string_ends_the_text(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(b"one\n\ntwo")
    monkeypatch.setattr(Sampler, "__call__", lambda *_: torch.tensor([next(answers)]))
    assert "".join(generate(model, "x", tokenizer=BYTES, stop="\n\n")) == "one"
    assert next(answers) == ord("t")


def test_no_tokens_are_written_where_none_are_asked_for(model: LanguageModel) -> None:
    assert list(generate(model, [1], max_new_tokens=0)) == []


def test_only_ids_of_the_tokenizer_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A released model's vocabulary is padded beyond its tokenizer's."""
    padded = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=300))
    monkeypatch.setattr(Sampler, "__call__", lambda _, logits, __: torch.tensor([logits.shape[-1] - 2]))
    assert len("".join(generate(padded, "x", tokenizer=BYTES, max_new_tokens=4))) == 4
    assert list(generate(padded, [1], max_new_tokens=1)) == [298]


def test_gradients_are_off_inside_only(model: LanguageModel) -> None:
    for _ in generate(model, [1], max_new_tokens=2):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        ([], {}, "the prompt is empty"),
        ([257], {}, "token id 257 is outside"),
        ([-1], {}, "token id -1 is outside"),
        ("text", {}, "need a tokenizer"),
        ([1], {"stop": "x"}, "need a tokenizer"),
        ([1], {"tokenizer": BYTES}, "the prompt must be text"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens must be 0 or more"),
        ([1], {"top_p": 0}, "top_p must be above 0"),
        ("x", {"tokenizer": BYTES, "stop": ""}, "a stop string must not be empty"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    model: LanguageModel, prompt: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        generate(model, prompt, **options)


def test_the_state_does_not_grow(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = model.step

    def watched(ids: Tensor, state: ModelState) -> Any:
        assert ids.shape == (1,)
        sizes.append(state.nbytes)
        return step(ids, state)

    monkeypatch.setattr(model, "step", watched)
    assert len(list(generate(model, [1], max_new_tokens=50))) == 50
    assert len(sizes) == 49, "the last token is not read"
    assert set(sizes) == {model.init_state(1).nbytes}
