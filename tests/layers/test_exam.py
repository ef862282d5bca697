"""The exam that every mixer sits: one map, however its input is cut, packed or fed."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selective_ssm.config import from_tagged, to_tagged
from selective_ssm.errors import UserError
from selective_ssm.layers import KINDS, MIXERS, SSMS, H3Config, MambaConfig, Mixer, PlainConfig, State, build_mixer
from selective_ssm.ops import dispatch
from tests.layers.cases import CASES, D_MODEL, build, is_causal, state_bytes
from tests.tolerance import assert_close_to_float64

ROOM = 32  # tokens, for states that grow

CAUSAL = [case for case, config in CASES.items() if is_causal(config)]

every_case = pytest.mark.parametrize("case", CASES)
every_causal_case = pytest.mark.parametrize("case", CAUSAL)
every_other_case = pytest.mark.parametrize("case", [case for case in CASES if case not in CAUSAL])


def grows(case: str) -> bool:
    """Whether a state is larger with room for more tokens."""
    nowhere = torch.device("meta")
    with nowhere:
        mixer = build_mixer(CASES[case], D_MODEL)
    little, much = (mixer.init_state(1, nowhere, torch.float32, max_length) for max_length in (1, ROOM))
    return nbytes(little) != nbytes(much)


def nbytes(state: State) -> int:
    return sum(part.nbytes for part in state)


every_growing_case = pytest.mark.parametrize("case", [case for case in CAUSAL if grows(case)])
every_constant_case = pytest.mark.parametrize("case", [case for case in CAUSAL if not grows(case)])


def random_input(batch: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, D_MODEL, dtype=dtype)


def random_state(mixer: Mixer, batch: int) -> State:
    """What a random text leaves behind, of another length in each row and with room for more."""
    lengths = [2 + 3 * row % 5 for row in range(batch)]
    empty = mixer.init_state(batch, torch.device("cpu"), torch.float64, max_length=ROOM)
    with torch.no_grad():
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        _, state = mixer(random_input(1, sum(lengths)), empty, cu_seqlens=cu_seqlens, return_state=True)
    return state


def by_steps(mixer: Mixer, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    if state is None:
        state = mixer.init_state(x.shape[0], x.device, x.dtype, max_length=x.shape[1])
    state = tuple(part.clone() for part in state)
    ys = []
    with torch.no_grad():
        for x_t in x.unbind(1):
            y_t, state = mixer.step(x_t, state)
            ys.append(y_t)
    return torch.stack(ys, 1), state


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """float64: within 1e-9 of the largest expected value."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.numel():
        assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max()


def assert_same_states(actual: State | None, expected: State | None) -> None:
    assert actual is not None
    assert expected is not None
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)


def test_every_kind_sits_the_exam() -> None:
    examined = {config.kind for config in CASES.values()}
    blocks = (MambaConfig, H3Config, PlainConfig)
    inside = {config.ssm.kind for config in CASES.values() if isinstance(config, blocks) and config.ssm}
    assert examined == set(MIXERS)
    assert inside == set(SSMS)


@every_causal_case
def test_forward_is_as_many_steps(case: str) -> None:
    mixer, x = build(case), random_input(2, 9)
    before = random_state(mixer, 2)
    y, end = mixer(x, before, return_state=True)
    stepped, stepped_end = by_steps(mixer, x, before)
    assert_same(stepped, y)
    assert_same_states(stepped_end, end)


@every_causal_case
def test_no_state_is_the_state_before_the_first_token(case: str) -> None:
    mixer, x = build(case), random_input(2, 9)
    assert_same(by_steps(mixer, x)[0], mixer(x)[0])


@every_causal_case
@settings(max_examples=8)
@given(batch=st.integers(1, 3), length=st.integers(0, 70), cut=st.integers(0, 70))
def test_two_chunks_are_one_pass(case: str, batch: int, length: int, cut: int) -> None:
    mixer, x = build(case), random_input(batch, length)
    y, end = mixer(x, return_state=True)
    first, state = mixer(x[:, :cut], return_state=True)
    second, last = mixer(x[:, cut:], state, return_state=True)
    assert_same(torch.cat([first, second], 1), y)
    assert_same_states(last, end)


@every_causal_case
def test_no_rows_are_rows_too(case: str) -> None:
    mixer, x = build(case), random_input(0, 5)
    y, state = mixer(x, return_state=True)
    assert y.shape == x.shape
    y, state = mixer(x, state, return_state=True)
    assert all(len(part) == 0 for part in state)
    y.sum().backward()
    assert by_steps(mixer, x)[0].shape == x.shape


@every_causal_case
@settings(max_examples=6)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_packed_sequences_are_separate_ones(case: str, lengths: Sequence[int]) -> None:
    lengths = [*lengths, 0, 3]
    mixer, x = build(case), random_input(1, sum(lengths))
    before = random_state(mixer, len(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    y, end = mixer(x, before, cu_seqlens=cu_seqlens, return_state=True)
    for index, piece in enumerate(x.split(lengths, dim=1)):
        own = tuple(part[index : index + 1] for part in before)
        expected, state = mixer(piece, own, return_state=True)
        assert_same(y[:, cu_seqlens[index] : cu_seqlens[index + 1]], expected)
        assert_same_states(tuple(part[index : index + 1] for part in end), state)
    unresumed, _ = mixer(x, cu_seqlens=cu_seqlens)
    assert_same(unresumed[:, -3:], mixer(x[:, -3:])[0])


@every_causal_case
def test_a_later_input_never_moves_an_earlier_output(case: str) -> None:
    mixer, x = build(case), random_input(1, 12)
    moved = x.clone()
    moved[:, 7:] += 1
    y, y_moved = mixer(x)[0], mixer(moved)[0]
    assert_same(y_moved[:, :7], y[:, :7])
    assert not torch.allclose(y_moved[:, 7:], y[:, 7:])


@every_other_case
def test_what_looks_ahead_has_no_state(case: str) -> None:
    mixer, x = build(case), random_input(1, 12)
    moved = x.clone()
    moved[:, -1] += 1
    assert not torch.isclose(mixer(x)[0], mixer(moved)[0]).all(-1).any()
    with pytest.raises(UserError, match="no state and no step"):
        mixer(x, return_state=True)
    with pytest.raises(UserError, match="no state and no step"):
        mixer.init_state(1, x.device, x.dtype)


@every_other_case
def test_what_looks_ahead_looks_no_further_than_its_sequence(case: str) -> None:
    lengths = [5, 0, 1, 17, 6]
    mixer, x = build(case), random_input(1, sum(lengths))
    y, _ = mixer(x, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    assert_same(y, torch.cat([mixer(piece)[0] for piece in x.split(lengths, dim=1)], 1))


def measured(state: State) -> list[Tensor]:
    return [part for part in state if part.is_floating_point() or part.is_complex()]


def gradients(mixer: Mixer, x: Tensor, before: State, cuts: Sequence[int]) -> list[Tensor]:
    """Of a weighted sum of output and end state: for the input, the state it starts from, and every parameter.

    What counts, such as a length, has no gradient.
    """
    leaves = [x, *measured(before), *mixer.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    ys, state = [], before
    for piece in x.split(list(cuts), dim=1):
        y, state = mixer(piece, state, return_state=True)
        ys.append(y)
    parts = (torch.view_as_real(part) if part.is_complex() else part for part in measured(state))
    results = [torch.cat(ys, 1), *parts]
    total = torch.stack([(part * torch.linspace(-1, 1, part.numel()).view_as(part)).sum() for part in results]).sum()
    return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))


@every_causal_case
def test_gradients_flow_through_a_state(case: str) -> None:
    mixer, x = build(case), random_input(2, 10)
    before = random_state(mixer, 2)
    for chunked, whole in zip(gradients(mixer, x, before, [4, 6]), gradients(mixer, x, before, [10]), strict=True):
        assert_same(chunked, whole)


@every_case
def test_gradients_are_those_of_finite_differences(case: str) -> None:
    mixer, x = build(case), random_input(1, 6)
    leaves = [x, *mixer.parameters()]
    directions = [torch.randn_like(leaf) for leaf in leaves]
    weight = torch.randn(1, 6, D_MODEL, dtype=torch.float64)

    def total(step: float) -> Tensor:
        moved = [leaf + step * direction for leaf, direction in zip(leaves, directions, strict=True)]
        names = [name for name, _ in mixer.named_parameters()]
        return (torch.func.functional_call(mixer, dict(zip(names, moved[1:], strict=True)), moved[0])[0] * weight).sum()

    for leaf in leaves:
        leaf.requires_grad_()
    gradient = torch.autograd.grad(total(0.0), leaves)
    slope = torch.stack([(g * v).sum() for g, v in zip(gradient, directions, strict=True)]).sum()
    size = 1e-4
    with torch.no_grad():  # five points: the error is of fourth order in the step
        measured = (8 * (total(size) - total(-size)) - (total(2 * size) - total(-2 * size))) / (12 * size)
    assert slope.item() == pytest.approx(measured.item(), rel=1e-7, abs=1e-9)


@every_causal_case
def test_forward_leaves_its_state_untouched(case: str) -> None:
    mixer, x = build(case), random_input(2, 5)
    before = random_state(mixer, 2)
    kept = tuple(part.clone() for part in before)
    mixer(x, before, return_state=True)
    assert all(torch.equal(part, copied) for part, copied in zip(before, kept, strict=True))


@every_constant_case
def test_the_state_has_the_same_size_whatever_the_length(case: str) -> None:
    mixer, config = build(case, torch.float32), CASES[case]
    start = mixer.init_state(3, torch.device("cpu"), torch.float32, max_length=7)
    _, end = mixer(random_input(3, 50, torch.float32), return_state=True)
    assert nbytes(start) == nbytes(end) == 3 * state_bytes(config)
    low = mixer.init_state(3, torch.device("cpu"), torch.bfloat16)
    assert nbytes(low) == 3 * state_bytes(config, activation=2)


@every_growing_case
def test_a_state_that_grows_has_the_room_that_is_asked_for_or_read(case: str) -> None:
    mixer, config = build(case, torch.float32), CASES[case]
    start = mixer.init_state(3, torch.device("cpu"), torch.float32, max_length=7)
    assert nbytes(start) == 3 * state_bytes(config, tokens=7)
    for read, room in ((3, 7), (50, 50)):
        _, end = mixer(random_input(3, read, torch.float32), start, return_state=True)
        assert nbytes(end) == 3 * state_bytes(config, tokens=room)
    low = mixer.init_state(3, torch.device("cpu"), torch.bfloat16, max_length=7)
    assert nbytes(low) == 3 * state_bytes(config, tokens=7, activation=2)
    none = mixer.init_state(3, torch.device("cpu"), torch.float32)
    assert nbytes(none) == 3 * state_bytes(config)


@every_growing_case
def test_a_step_is_refused_where_there_is_no_room(case: str) -> None:
    mixer, x = build(case), random_input(2, 3)
    by_steps(mixer, x[:, :2])
    with pytest.raises(UserError, match="max_length"):
        by_steps(mixer, x, mixer.init_state(2, x.device, x.dtype, max_length=2))
    with pytest.raises(UserError, match="max_length"):
        by_steps(mixer, x, mixer.init_state(2, x.device, x.dtype))


@every_causal_case
def test_rows_use_the_slots_they_name(case: str) -> None:
    mixer, x = build(case), random_input(3, 1)[:, 0]
    slots = random_state(mixer, 5)
    indices = torch.tensor([3, -1, 0])
    own = tuple(part[[3, 0]].clone() for part in slots)
    kept = tuple(part.clone() for part in slots)
    with torch.no_grad():
        expected, after = mixer.step(x[[0, 2]], own)
        y, slots = mixer.step(x, slots, state_indices=indices)
    assert_same(y[[0, 2]], expected)
    for part, new, old in zip(slots, after, kept, strict=True):
        assert_same(part[[3, 0]], new)
        assert torch.equal(part[[1, 2, 4]], old[[1, 2, 4]])


@every_case
def test_strides_do_not_matter(case: str) -> None:
    mixer = build(case)
    x = torch.randn(5, 2, 2 * D_MODEL, dtype=torch.float64).transpose(0, 1)[:, :, ::2]
    assert not x.is_contiguous()
    assert_same(mixer(x)[0], mixer(x.contiguous())[0])


@every_causal_case
def test_single_precision_is_as_good_by_steps_as_at_once(case: str) -> None:
    mixer, x = build(case, torch.float32), random_input(2, 63, torch.float32)
    exact = copy.deepcopy(mixer).double()(x.double())[0]
    y = mixer(x, return_state=True)[0]
    assert_close_to_float64(by_steps(mixer, x)[0], y, exact, name="steps")
    assert_close_to_float64(mixer(x)[0], y, exact, name="stateless forward")


@every_causal_case
@pytest.mark.parametrize("backend", [name for name in dispatch.BACKENDS if name != "reference"])
def test_backends_agree_with_the_reference(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = build(case, torch.float32), random_input(2, 40, torch.float32)
    exact = copy.deepcopy(mixer).double()(x.double())[0]
    reference = mixer(x, return_state=True)[0]
    monkeypatch.setenv("SELECTIVE_SSM_BACKEND", backend)
    try:
        actual = mixer(x, return_state=True)[0]
    except ValueError as reason:
        pytest.skip(str(reason))
    assert_close_to_float64(actual, reference, exact)


@every_causal_case
def test_autocast_is_as_good_as_low_precision_weights(case: str) -> None:
    mixer, x = build(case, torch.float32), random_input(2, 20, torch.float32)
    exact = copy.deepcopy(mixer).double()(x.double())[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x, return_state=True)
        resumed, _ = mixer(x, state)
    assert y.dtype == resumed.dtype == torch.bfloat16
    low = copy.deepcopy(mixer).bfloat16()(x.bfloat16())[0]
    assert_close_to_float64(y, low, exact)


@every_case
def test_a_mixer_built_on_the_meta_device_is_initialised_alike(case: str) -> None:
    with torch.device("meta"):
        mixer = build_mixer(CASES[case], D_MODEL)
    assert {parameter.device.type for parameter in mixer.parameters()} == {"meta"}
    mixer.reset_parameters()
    mixer.to_empty(device="cpu")
    other = build_mixer(CASES[case], D_MODEL)
    for one in (mixer, other):
        torch.manual_seed(1)
        one.reset_parameters()
    for (name, made), expected in zip(mixer.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(made, expected), name
        assert made.isfinite().all(), name


@every_causal_case
def test_nothing_is_copied_from_the_host(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it would be waited for, and no CUDA graph could hold it."""
    mixer, x = build(case), random_input(2, 5)
    state = mixer.init_state(2, x.device, x.dtype, max_length=6)

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a tensor made of a list")

    monkeypatch.setattr(torch, "tensor", refuse)
    y, state = mixer(x, state, return_state=True)
    y.sum().backward()
    with torch.no_grad():
        mixer.step(x[:, 0], tuple(part.detach() for part in state))


@every_causal_case
def test_shapes_are_known_without_values(case: str) -> None:
    nowhere = torch.device("meta")
    mixer, x = build(case).to(nowhere), random_input(2, 5).to(nowhere)
    y, _ = mixer(x, return_state=True)
    assert y.shape == x.shape
    some = torch.empty(2, dtype=torch.int64, device=nowhere)
    for slots, indices in ((2, None), (3, some)):
        state = mixer.init_state(slots, nowhere, x.dtype, max_length=1)
        with torch.no_grad():
            assert mixer.step(x[:, 0], state, state_indices=indices)[0].shape == x[:, 0].shape


@every_case
def test_a_copy_is_whole_and_independent(case: str) -> None:
    mixer, x = build(case), random_input(1, 4)
    y = mixer(x)[0]
    twin = copy.deepcopy(mixer)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.zero_()
    assert torch.equal(twin(x)[0], y)


@every_case
def test_a_config_survives_json(case: str) -> None:
    written = json.dumps(to_tagged(CASES[case]))
    assert from_tagged(json.loads(written), KINDS) == CASES[case]


def test_declared_parameters_exist() -> None:
    """Each name that a class declares is a parameter of it in some case."""
    declared: set[tuple[str, str]] = set()
    present: set[tuple[str, str]] = set()
    for case in CASES:
        for module in build(case).modules():
            kind = type(module).__name__
            declared |= {(kind, name) for name in getattr(module, "no_weight_decay", ())}
            declared |= {(kind, name) for name in getattr(module, "learning_rates", ())}
            present |= {(kind, name) for name, _ in module.named_parameters(recurse=False)}
    assert declared
    assert declared <= present
