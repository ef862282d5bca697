"""The engine: whatever comes and goes meanwhile, each text is what it would be alone, and every slot comes back."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selective_ssm.data import ByteTokenizer
from selective_ssm.errors import UserError
from selective_ssm.generation import Bookmark, Engine, QueueFull, Request, Sampling
from selective_ssm.generation.digest import START, extend
from selective_ssm.generation.slots import Slots
from selective_ssm.layers import AttentionConfig, MambaConfig
from selective_ssm.models import LanguageModel, LanguageModelConfig
from tests.generation.oracle import shared_model, untrained_model, written_alone

BYTES = ByteTokenizer()
LONGEST = 12
CASES: list[tuple[list[int], Sampling]] = [
    ([1], Sampling(temperature=0)),
    ([5, 6, 7], Sampling(seed=1)),
    ([5, 6, 7], Sampling(seed=2, top_k=20)),
    ([*range(100, 130)], Sampling(temperature=0.75, top_p=0.9)),
    ([*range(100, 130)], Sampling(seed=-5, min_p=0.01, repetition_penalty=1.25)),
    ([*range(100, 117), 3], Sampling(temperature=0, repetition_penalty=2.0)),
]


class Clock:
    """Shows what it is set to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@cache
def alone(case: int) -> list[int]:
    return written_alone(shared_model(), CASES[case][0], LONGEST, CASES[case][1])


def ask(engine: Engine, case: int, **wishes: Any) -> Request:
    prompt, sampling = CASES[case]
    return engine.submit(prompt, **wishes, **vars(sampling))


def assert_is_empty(engine: Engine, slots: int) -> None:
    now = engine.stats()
    assert (now.free_slots, now.queued, now.reading, now.running) == (slots, 0, 0, 0)
    assert not engine.step()


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, len(CASES) - 1), st.integers(0, LONGEST), st.booleans()),
        st.tuples(st.just("submit with a deadline"), st.integers(0, len(CASES) - 1), st.integers(0, 4)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.integers(1, 4)),
    ),
    min_size=5,
    max_size=30,
)


@settings(max_examples=40)
@given(EVENTS, st.integers(1, 5), st.sampled_from([1, 3, 7, 1000]), st.booleans(), st.sampled_from([0, 10**5, 10**7]))
def test_whatever_comes_and_goes_a_text_is_what_it_is_alone(
    events: list[tuple[Any, ...]], slots: int, budget: int, ahead: bool, prefix_bytes: int
) -> None:
    clock = Clock()
    options: dict[str, Any] = {"prefill_budget": budget, "run_ahead": ahead, "prefix_bytes": prefix_bytes}
    engine = Engine(shared_model(), slots=slots, clock=clock, **options)
    asked: list[tuple[Request, int, int, set[str]]] = []
    for kind, *numbers in events:
        if kind == "submit":
            case, count, keeps = numbers
            asked.append((ask(engine, case, max_new_tokens=count, keep_state=keeps), case, count, {"length"}))
        elif kind == "submit with a deadline":
            case, seconds = numbers
            request = ask(engine, case, max_new_tokens=LONGEST, deadline=seconds)
            asked.append((request, case, LONGEST, {"length", "deadline"}))
        elif kind == "cancel" and asked:
            request, *_, finishes = asked[numbers[0] % len(asked)]
            request.cancel()
            finishes.add("cancelled")
        else:
            for _ in range(numbers[0]):
                engine.step()
                clock.now += 1
    engine.run()
    assert_is_empty(engine, slots)
    for request, case, count, finishes in asked:
        one = request.result()
        assert one.finish in finishes
        assert one.ids == alone(case)[: len(one.ids)]
        assert len(one.ids) == count or one.finish != "length"
        if one.state is not None and CASES[case][1].repetition_penalty == 1:
            rest = engine.submit([], state=one.state, max_new_tokens=LONGEST - len(one.ids), **vars(CASES[case][1]))
            assert one.ids + rest.result().ids == alone(case), "a bookmark goes on as if nothing had been"


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("budget", [1, 4, 1000])
def test_requests_are_served_in_the_order_of_arrival(ahead: bool, budget: int) -> None:
    engine = Engine(shared_model(), slots=1, prefill_budget=budget, run_ahead=ahead)
    requests = [ask(engine, case % len(CASES), max_new_tokens=4) for case in range(9)]
    done: list[int] = []
    while len(done) < 9:
        engine.step()
        done += [place for place, one in enumerate(requests) if one.is_done and place not in done]
    assert done == list(range(9))


def test_texts_that_are_written_go_on_while_a_long_prompt_is_read() -> None:
    engine = Engine(shared_model(), slots=2, prefill_budget=5, run_ahead=False)
    short = ask(engine, 0, max_new_tokens=12)
    engine.step()
    long = ask(engine, 3, max_new_tokens=1)
    for steps in range(1, 6):
        engine.step()
        assert len(list_now(short)) == 1 + steps, "a token each step"
        assert not long.is_done
    engine.step()
    assert long.result().ids == alone(3)[:1], "29 tokens are read in six steps of five"


def list_now(request: Request) -> list[Any]:
    """What has been written, without a step."""
    return list(request._job.ids)  # pyright: ignore[reportPrivateUsage]


def test_a_step_ahead_asks_for_no_more_tokens_than_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = untrained_model()
    engine = Engine(model, slots=4, run_ahead=True)
    steps = 0
    step = model.step

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*arguments, **options)

    monkeypatch.setattr(model, "step", watched)
    requests = [engine.submit([1], max_new_tokens=5, seed=seed) for seed in range(3)]
    engine.run()
    assert steps == 5
    assert [len(one.result().ids) for one in requests] == [5, 5, 5]
    last = engine.submit([1], max_new_tokens=5, temperature=0)
    (first, *_) = last.result().ids
    steps = 0
    ended = engine.submit([1], temperature=0, stop_ids=[first])
    beside = engine.submit([1], max_new_tokens=4)
    engine.run()
    assert ended.result().ids == [first]
    assert steps == 4, "the token after the end was on its way with the other text's, and is dropped"
    assert len(beside.result().ids) == 4


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("end", ["stop id", "cancelled", "deadline", "length"])
def test_a_bookmark_goes_on_whatever_ended_the_text(end: str, ahead: bool) -> None:
    clock = Clock()
    engine = Engine(shared_model(), slots=2, run_ahead=ahead, clock=clock)
    wishes: dict[str, Any] = {"stop_ids": alone(1)[3:4]} if end == "stop id" else {}
    request = ask(engine, 1, keep_state=True, deadline=3, max_new_tokens=4 if end == "length" else LONGEST, **wishes)
    beside = ask(engine, 2, max_new_tokens=LONGEST)
    for _ in range(4):
        engine.step()
    if end == "cancelled":
        request.cancel()
    clock.now = 5 if end == "deadline" else 0
    one = request.result()
    assert (one.ids, one.finish) == (alone(1)[:4], "end" if end == "stop id" else end)
    assert one.state is not None
    assert one.state.digest == extend(START, CASES[1][0] + one.ids)[-1]
    for _ in range(2):  # a bookmark may be used again
        rest = engine.submit([], state=one.state, max_new_tokens=LONGEST - 4, keep_state=True).result()
        assert one.ids + rest.ids == alone(1)
        assert rest.state is not None
        assert rest.state.digest == extend(START, CASES[1][0] + alone(1))[-1]
    assert beside.result().ids == alone(2)


def test_texts_that_wait_with_a_bookmark_share_its_memory() -> None:
    engine = Engine(shared_model(), slots=2)
    bookmark = ask(engine, 1, max_new_tokens=4, keep_state=True).result().state
    assert bookmark is not None
    before = bookmark.state.clone()
    requests = [engine.submit([], state=bookmark, max_new_tokens=LONGEST - 4) for _ in range(5)]
    assert all(one._job.state is bookmark.state for one in requests)  # pyright: ignore[reportPrivateUsage]
    assert {tuple(one.result().ids) for one in requests} == {tuple(alone(1)[4:])}
    for name, tensor in bookmark.state.tensors().items():
        assert torch.equal(tensor, before.tensors()[name])


def test_prompts_that_begin_alike_are_read_once() -> None:
    engine = Engine(shared_model(), slots=2, prefill_budget=10, prefix_bytes=10**7)
    assert ask(engine, 3, max_new_tokens=5).result().cached_tokens == 0
    again, other = ask(engine, 4, max_new_tokens=5), ask(engine, 5, max_new_tokens=5)
    assert again.result().ids == alone(4)[:5]
    assert again.result().cached_tokens == 29
    assert other.result().ids == alone(5)[:5]
    assert other.result().cached_tokens == 10, "as far as a chunk of the longer prompt went that is alike"
    now = engine.stats()
    assert (now.prefix_hits, now.prefix_misses) == (2, 1)


def test_a_prompt_that_is_being_read_is_waited_for() -> None:
    engine = Engine(shared_model(), slots=4, prefill_budget=6, prefix_bytes=10**7)
    first, second, third = (ask(engine, 3, max_new_tokens=3) for _ in range(3))
    for request in (third, first, second):
        assert request.result().ids == alone(3)[:3]
    assert [one.result().cached_tokens for one in (first, second, third)] == [0, 29, 29]


def test_when_the_one_that_is_waited_for_is_called_off_the_next_reads() -> None:
    engine = Engine(shared_model(), slots=4, prefill_budget=6, prefix_bytes=10**7)
    first, second = (ask(engine, 3, max_new_tokens=3) for _ in range(2))
    engine.step()
    first.cancel()
    assert second.result().ids == alone(3)[:3]
    assert second.result().cached_tokens == 6


def test_what_other_weights_have_read_is_forgotten() -> None:
    model, other = untrained_model(), untrained_model()
    engine = Engine(model, slots=1, prefix_bytes=10**7)
    for _ in range(2):
        wanted = Engine(model, slots=1).submit(CASES[3][0], max_new_tokens=5).result().ids
        assert [engine.submit(CASES[3][0], max_new_tokens=5).result().ids for _ in range(2)] == [wanted] * 2
        model.load_state_dict(other.state_dict())
    assert engine.stats().prefix_hits == 2


def test_deadlines_are_kept_while_waiting_reading_and_writing() -> None:
    clock = Clock()
    engine = Engine(shared_model(), slots=2, prefill_budget=3, run_ahead=False, clock=clock)
    writing = ask(engine, 0, max_new_tokens=9, deadline=1.5, keep_state=True)
    reading = ask(engine, 3, deadline=1.5, keep_state=True)
    waiting = ask(engine, 1, deadline=1.5)
    unhurried = ask(engine, 1, max_new_tokens=3)
    for _ in range(3):
        engine.step()
        clock.now += 1
    assert [one.result().finish for one in (writing, reading, waiting)] == ["deadline"] * 3
    assert writing.result().ids == alone(0)[:2]
    assert (reading.result().ids, waiting.result().ids) == ([], [])
    assert unhurried.result().ids == alone(1)[:3]
    rest = engine.submit([], state=writing.result().state, max_new_tokens=3, temperature=0)
    assert writing.result().ids + rest.result().ids == alone(0)[:5], "what ended too soon can be gone on with"
    assert reading.result().state is None, "its prompt was not read to its end"
    assert_is_empty(engine, 2)


def test_a_cancelled_text_keeps_what_it_has() -> None:
    engine = Engine(shared_model(), slots=1, run_ahead=True)
    request, waiting = ask(engine, 1, max_new_tokens=12), ask(engine, 2, max_new_tokens=3)
    for token, expected in zip(request, alone(1)[:4], strict=False):
        assert token == expected
        if token == alone(1)[3]:
            request.cancel()
    one = request.result()
    assert one.finish == "cancelled"
    assert one.ids == alone(1)[: len(one.ids)]
    assert waiting.result().ids == alone(2)[:3]
    request.cancel()
    engine.run()
    assert request.result().finish == "cancelled"
    assert_is_empty(engine, 1)


class Spoilt(ByteTokenizer):
    """Cannot decode one of its ids."""

    def __init__(self, spoilt: int = 200) -> None:
        self.spoilt = spoilt

    def decode(self, ids: Iterable[int]) -> bytes:
        ids = list(ids)
        if ids[-1] == self.spoilt:
            raise LookupError(f"{self.spoilt} is spoilt")
        return super().decode(ids)


@pytest.mark.parametrize("stop", [(), "\0\0\0\0"], ids=["as it is read", "as it is written"])
def test_what_goes_wrong_with_one_text_is_raised_there_and_frees_its_slot(stop: str, monkeypatch: Any) -> None:
    engine = Engine(shared_model(), Spoilt(), slots=2)
    bad = engine.submit([1, 200], max_new_tokens=9, stop=stop)
    good = engine.submit([5, 6, 7], max_new_tokens=9, stop=stop, seed=1)
    with pytest.raises(LookupError, match="200 is spoilt"):
        list(bad)
    assert bad.is_done
    assert good.result().ids == alone(1)[:9]
    with pytest.raises(LookupError, match="200 is spoilt"):
        bad.result()
    assert_is_empty(engine, 2)


def test_where_the_model_fails_all_that_it_had_in_hand_is_over_and_the_rest_goes_on(monkeypatch: Any) -> None:
    model = untrained_model()
    engine = Engine(model, slots=2)
    requests = [engine.submit([1], max_new_tokens=4, seed=seed) for seed in range(3)]
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(model, "step", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    for one in requests[:2]:
        with pytest.raises(ZeroDivisionError):
            one.result()
    assert len(requests[2].result().ids) == 4
    assert_is_empty(engine, 2)


def test_others_failures_are_not_raised_to_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    model = untrained_model()
    engine = Engine(model, slots=1)
    first, second = (engine.submit([1], max_new_tokens=4) for _ in range(2))
    engine.step()
    real, fails = model.step, iter([True])
    monkeypatch.setattr(model, "step", lambda *a, **k: 1 / 0 if next(fails, False) else real(*a, **k))
    assert len(second.result().ids) == 4
    with pytest.raises(ZeroDivisionError):
        first.result()
    assert_is_empty(engine, 1)


def test_where_nothing_can_go_on_every_text_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(shared_model(), slots=1)
    requests = [engine.submit([1], max_new_tokens=4) for _ in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(engine._loop, "_admit", lambda: 1 / 0)
        for request in requests:
            with pytest.raises(ZeroDivisionError):
                request.result()
    assert_is_empty(engine, 1)


def test_a_wait_that_is_cancelled_calls_the_text_off() -> None:
    engine = Engine(shared_model(), slots=1)
    request = engine.submit([1], max_new_tokens=10**6)

    async def wait() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(request, 0.05)

    asyncio.run(wait())
    assert request.result().finish == "cancelled"
    assert_is_empty(engine, 1)


def test_a_text_that_cannot_begin_is_over_too(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(shared_model(), slots=1)
    request = engine.submit([1, 2], max_new_tokens=4)
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "begin", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert request.is_done
    with pytest.raises(ZeroDivisionError):
        request.result()
    assert_is_empty(engine, 1)


def test_300_requests_through_16_slots() -> None:
    """Some called off, some too late, some that nobody reads on, some that fail; memory stays where it was."""
    model, clock = untrained_model(d_model=8, n_layer=1), Clock()
    prompts = [torch.randint(200, (1 + 11 * number,)).tolist() for number in range(6)]
    whole = [Engine(model, slots=1).submit(prompts[seed], seed=seed).result().ids for seed in range(6)]
    tokenizer = Spoilt(whole[0][100])
    engine = Engine(model, tokenizer, slots=16, prefill_budget=64, prefix_bytes=10**5, run_ahead=True, clock=clock)
    for count in range(1, 17):
        engine.submit([1], max_new_tokens=count)
    engine.run()  # so that what each number of rows needs is there

    def a_third(numbers: range) -> Counter[str]:
        """How many of the requests ended how."""
        requests: list[Request] = []
        for number in numbers:
            wishes: dict[str, Any] = {"max_new_tokens": 1 + 37 * number % 256, "seed": number % 6}
            wishes |= {"deadline": 20.0 if number % 10 == 3 else None, "stop": "\0\0\0\0" if number % 7 == 0 else ()}
            requests.append(engine.submit(prompts[number % 6], **wishes))
        assert len(next(iter(requests[5]))) > 0, "and that is all that is read of it for now"
        while engine.step():
            clock.now += 1
            if int(clock.now) % 9 == 0:
                requests[int(clock.now) % 100].cancel()
        ends: Counter[str] = Counter()
        for number, request in zip(numbers, requests, strict=True):
            assert request.is_done
            try:
                one = request.result()
            except LookupError:
                ends["failed"] += 1
                assert tokenizer.spoilt in whole[number % 6]
                continue
            ends[one.finish] += 1
            assert one.ids == whole[number % 6][: len(one.ids)]
            assert len(one.ids) == 1 + 37 * number % 256 or one.finish != "length"
        return ends

    alive: list[int] = []
    for start in (0, 100, 200):
        ends = a_third(range(start, start + 100))
        assert all(ends[kind] for kind in ("length", "cancelled", "deadline", "failed")), ends
        assert_is_empty(engine, 16)
        gc.collect()
        alive.append(sum(type(one) is torch.Tensor for one in gc.get_objects()))
    assert alive[1] == alive[2]


def test_requests_can_be_awaited_together() -> None:
    async def all_of_them() -> list[Any]:
        engine = Engine(shared_model(), slots=3)
        return await asyncio.gather(*(ask(engine, case, max_new_tokens=LONGEST) for case in range(len(CASES))))

    assert [one.ids for one in asyncio.run(all_of_them())] == [alone(case) for case in range(len(CASES))]


def test_threads_may_share_an_engine() -> None:
    engine = Engine(shared_model(), slots=2, run_ahead=True)
    found: dict[int, list[Any]] = {}

    def read(case: int) -> None:
        found[case] = list(ask(engine, case, max_new_tokens=LONGEST))

    threads = [threading.Thread(target=read, args=(case,)) for case in range(len(CASES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {case: alone(case) for case in range(len(CASES))}
    assert_is_empty(engine, 2)


def test_a_request_can_be_read_again_and_tells_how_it_is() -> None:
    engine = Engine(shared_model(), BYTES, slots=1)
    request = engine.submit("añ", max_new_tokens=20, seed=3)
    assert repr(request) == "Request(4 tokens, 0 written, going on)"
    text = "".join(request)
    assert "".join(request) == text == request.result().text
    assert repr(request) == "Request(4 tokens, 20 written, length)"


def test_counters_tell_the_times() -> None:
    clock = Clock()
    engine = Engine(shared_model(), slots=1, prefill_budget=10, run_ahead=False, clock=clock)
    ask(engine, 3, max_new_tokens=2)
    ask(engine, 0, max_new_tokens=2)
    assert engine.stats().queued == 2
    for seconds in (1, 2, 4, 8, 16, 32):
        engine.step()
        clock.now += seconds
        if seconds == 1:
            now = engine.stats()
            assert (now.queued, now.reading, now.running, now.free_slots) == (1, 1, 0, 0)
    now = engine.stats()
    assert now.tokens == 4
    assert (now.first_token_mean, now.first_token_max) == (9, 15), "3 s for the first text, 15 s for the second"
    assert (now.between_tokens_mean, now.between_tokens_max) == (10, 16), "4 s and 16 s"


def test_tokens_a_second_are_those_of_the_time_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = Clock(), untrained_model()
    engine = Engine(model, slots=2, clock=clock)
    step = model.step

    def two_seconds(*arguments: Any, **options: Any) -> Any:
        clock.now += 2
        return step(*arguments, **options)

    monkeypatch.setattr(model, "step", two_seconds)
    engine.submit([1], max_new_tokens=4)
    engine.submit([1], max_new_tokens=4)
    while engine.step():
        clock.now += 100
    assert engine.stats().tokens_per_second == 1.0


@pytest.mark.parametrize(
    ("prompt", "wishes", "sentence"),
    [
        ([], {}, "the prompt is empty"),
        ([300], {}, "token id 300 is outside the vocabulary \\(0 to 256\\)"),
        ("text", {}, "text and stop strings need a tokenizer"),
        ([1], {"stop": "x"}, "text and stop strings need a tokenizer"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens must be 0 or more, got -1"),
        ([1], {"deadline": -1.0}, "deadline must be 0 seconds or more, got -1.0"),
        ([1], {"deadline": float("nan")}, "deadline must be 0 seconds or more, got nan"),
        ([1], {"top_k": -1}, "top_k must be"),
    ],
)
def test_bad_wishes_are_refused_at_once(prompt: Any, wishes: dict[str, Any], sentence: str) -> None:
    engine = Engine(shared_model(), slots=1)
    with pytest.raises(UserError, match=sentence):
        engine.submit(prompt, **wishes)
    assert_is_empty(engine, 1)


@pytest.mark.parametrize("room", [0, 1])
def test_a_full_queue_refuses_and_takes_again_when_there_is_room(room: int) -> None:
    """A text that a slot is there for does not wait."""
    engine = Engine(shared_model(), slots=2, max_queue=room)
    first, *_ = [ask(engine, 0, max_new_tokens=2) for _ in range(2 + room)]
    for _ in range(2):
        with pytest.raises(QueueFull, match=f"{room} texts wait already"):
            ask(engine, 1)
        engine.step()
    first.result()
    assert ask(engine, 1, max_new_tokens=2).result().ids == alone(1)[:2]


def test_a_text_longer_than_the_models_positions_is_refused() -> None:
    model = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16, max_positions=6))
    engine = Engine(model, slots=1)
    one = engine.submit([1, 2], max_new_tokens=3, keep_state=True).result()
    with pytest.raises(UserError, match="the model has 6 positions, but prompt and answer would take 7"):
        engine.submit([1, 2, 3], max_new_tokens=4)
    with pytest.raises(UserError, match="the model has 6 positions, but prompt and answer would take 7"):
        engine.submit([], state=one.state, max_new_tokens=2)
    assert len(engine.submit([], state=one.state, max_new_tokens=1).result().ids) == 1


def test_a_state_of_another_model_or_of_several_texts_is_refused() -> None:
    other = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16))
    engine = Engine(shared_model(), slots=1)
    with pytest.raises(UserError, match="a state of another model"):
        engine.submit([1], state=Bookmark(other.init_state(1), 1, b"", 0))
    with pytest.raises(UserError, match="a state of 2 slots"):
        engine.submit([1], state=Bookmark(shared_model().init_state(2), 1, b"", 0))


@pytest.mark.parametrize("prompt", [[], [1]])
def test_a_bookmark_whose_last_token_is_none_is_refused(prompt: list[int]) -> None:
    """A damaged file may hold one; it must not fail in a step, which other texts share."""
    engine = Engine(shared_model(), slots=1)
    with pytest.raises(UserError, match="token id 999 is outside the vocabulary"):
        engine.submit(prompt, state=Bookmark(shared_model().init_state(1), 999, b"", 0))


def test_an_id_that_the_tokenizer_does_not_know_is_refused() -> None:
    model = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=300))
    assert Engine(model).submit([280], max_new_tokens=1).result().prompt_tokens == 1
    with pytest.raises(UserError, match="token id 280 is outside the vocabulary \\(0 to 256\\)"):
        Engine(model, BYTES).submit([280])


@pytest.mark.parametrize(
    ("name", "value"), [("slots", 0), ("prefill_budget", 0), ("prefix_bytes", -1), ("max_queue", -1)]
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{name} must be . or more, got {value}"):
        Engine(shared_model(), **{name: value})  # pyright: ignore[reportArgumentType]


def test_a_tokenizer_with_more_ids_than_the_model_knows_is_refused() -> None:
    model = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16))
    with pytest.raises(UserError, match="the tokenizer has 257 ids, but the model knows only 16"):
        Engine(model, BYTES)


def test_a_model_whose_state_grows_is_refused() -> None:
    pattern = (MambaConfig(), AttentionConfig(n_heads=2))
    model = LanguageModel(LanguageModelConfig(d_model=8, n_layer=2, vocab_size=16, pattern=pattern))
    with pytest.raises(UserError, match="state grows with the text"):
        Engine(model)
