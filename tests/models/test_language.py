"""The language model: one map, whether text comes at once, in chunks, packed or token by token."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.layers import AttentionConfig, MambaConfig, MLPConfig, S4DConfig, S6Config
from selective_ssm.layers.recompute import Recompute
from selective_ssm.models import LanguageModel, LanguageModelConfig, ModelState
from selective_ssm.ops.selective_scan import reference

MAMBA = LanguageModelConfig(d_model=8, n_layer=2, vocab_size=11, pattern=(MambaConfig(ssm=S6Config(d_state=4)),))
HYBRID = LanguageModelConfig(
    d_model=6,
    n_layer=4,
    vocab_size=13,
    pattern=(MambaConfig(ssm=S6Config(d_state=4)), MLPConfig(multiple_of=8), MambaConfig(ssm=S4DConfig(d_state=4))),
    norm="layer",
    tie_embeddings=False,
    max_positions=64,
)
WITH_ATTENTION = LanguageModelConfig(
    d_model=6,
    n_layer=3,
    vocab_size=13,
    pattern=(
        AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=4, positions="rope"),
        MambaConfig(ssm=S6Config(d_state=4)),
        AttentionConfig(n_heads=3, positions="xpos"),
    ),
)
MEMORYLESS = LanguageModelConfig(d_model=6, n_layer=1, vocab_size=13, pattern=(MLPConfig(multiple_of=8),))
MODELS = {"mamba": MAMBA, "hybrid": HYBRID, "with attention": WITH_ATTENTION, "memoryless": MEMORYLESS}
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
ROOM = 16  # tokens, where states grow


def build(config: LanguageModelConfig) -> LanguageModel:
    return LanguageModel(config).double()


def some_ids(config: LanguageModelConfig, batch: int, length: int) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max()


def assert_same_states(actual: ModelState | None, expected: ModelState | None) -> None:
    assert actual is not None
    assert expected is not None
    assert torch.equal(actual.position, expected.position)
    for name, tensor in expected.tensors().items():
        assert_same(actual.tensors()[name], tensor)


@every_model
def test_forward_is_as_many_steps(config: LanguageModelConfig) -> None:
    model, ids = build(config), some_ids(config, 3, 7)
    whole = model(ids, return_state=True)
    state = model.init_state(3, max_length=7)
    for t in range(7):
        with torch.no_grad():
            logits, state = model.step(ids[:, t], state)
        assert_same(logits, whole.logits[:, t])
    assert_same_states(state, whole.state)
    assert_same(model(ids).logits, whole.logits)


@every_model
def test_what_is_read_for_the_state_alone_is_the_state(config: LanguageModelConfig) -> None:
    model, ids = build(config), some_ids(config, 1, 9)
    cuts = torch.tensor([0, 4, 4, 9])
    before = model.read(some_ids(config, 3, 5), model.init_state(3, ROOM))
    packed = model.read(ids, before, cu_seqlens=cuts)
    assert_same_states(packed, model(ids, before, cu_seqlens=cuts, return_state=True).state)
    assert_same_states(model.read(ids), model.prefill(ids).state)


@every_model
def test_chunks_and_prefill_are_one_pass(config: LanguageModelConfig) -> None:
    model, ids = build(config), some_ids(config, 2, 12)
    whole = model(ids, return_state=True)
    first = model(ids[:, :5], return_state=True)
    kept = first.state.clone()
    rest = model.prefill(ids[:, 5:], first.state)
    assert_same(first.logits, whole.logits[:, :5])
    assert_same(rest.logits, whole.logits[:, -1])
    assert_same_states(rest.state, whole.state)
    assert_same_states(first.state, kept)


@every_model
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_texts_are_separate_ones(config: LanguageModelConfig, dtype: torch.dtype) -> None:
    model = build(config)
    lengths = [4, 0, 7, 1]
    before = model.read(some_ids(config, 4, 3), model.init_state(4, ROOM))
    ids, cu_seqlens = some_ids(config, 1, sum(lengths)), torch.tensor([0, 4, 4, 11, 12], dtype=dtype)
    logits, end = model(ids, before, cu_seqlens=cu_seqlens, return_state=True)
    last, _ = model.prefill(ids, before, cu_seqlens=cu_seqlens)
    assert end.position.tolist() == [7, 3, 10, 4]
    assert last[1].isnan().all()
    for index in (0, 2, 3):
        start, stop = cu_seqlens[index : index + 2].tolist()
        expected, state = model(ids[:, start:stop], before.select([index]), return_state=True)
        assert_same(logits[:, start:stop], expected)
        assert_same(last[index], expected[0, -1])
        assert_same_states(end.select([index]), state)
    assert_same_states(end.select([1]), before.select([1]))
    fresh, _ = model(ids, cu_seqlens=cu_seqlens)
    assert_same(fresh[:, 4:11], model(ids[:, 4:11]).logits)


@every_model
def test_steps_use_the_slots_they_name(config: LanguageModelConfig) -> None:
    model, ids = build(config), some_ids(config, 3, 1)[:, 0]
    slots = model.read(some_ids(config, 4, 3), model.init_state(4, ROOM))
    with torch.no_grad():
        slots = slots.clone()
        kept = slots.clone()
        expected, after = model.step(ids[[0, 2]], slots.select([3, 1]))
        logits, slots = model.step(ids, slots, state_indices=torch.tensor([3, -1, 1]))
    assert_same(logits[[0, 2]], expected)
    assert_same_states(slots.select([3, 1]), after)
    assert_same_states(slots.select([0, 2]), kept.select([0, 2]))


def test_a_prompt_and_steps_after_it_where_the_state_grows(tmp_path: Path) -> None:
    """Read into room that was made, gone on from a chosen slot, a copy and a file; and refused past the room."""
    model, ids = build(WITH_ATTENTION), some_ids(WITH_ATTENTION, 2, 12)
    whole = model(ids).logits
    state = model.prefill(ids[:, :7], model.init_state(2, max_length=10)).state
    with torch.no_grad():
        state = state.clone()
        _, state = model.step(ids[:, 7], state)
        save_file(state.tensors(), tmp_path / "state.safetensors")
        again = model.init_state(2, max_length=10)
        for name, tensor in load_file(tmp_path / "state.safetensors").items():
            again.tensors()[name].copy_(tensor)
        copies = [state.select([1]), state.clone().select([1]), again.select([1])]
        for t in (8, 9):
            logits, state = model.step(ids[:, t], state)
            assert_same(logits, whole[:, t])
            for copied in copies:
                assert_same(model.step(ids[1:, t], copied).logits, logits[1:])
        with pytest.raises(UserError, match="room for 10 tokens and is full: give init_state a larger max_length"):
            model.step(ids[:, 10], state)
    assert_same(model(ids[:, 10:], state).logits, whole[:, 10:])


def test_a_step_reuses_the_memory_of_its_state() -> None:
    model = build(MAMBA)
    state = model.init_state(2)
    with torch.no_grad():
        _, after = model.step(torch.tensor([1, 2]), state)
    assert {tensor.data_ptr() for tensor in after.tensors().values()} == {
        tensor.data_ptr() for tensor in state.tensors().values()
    }
    assert after.position.tolist() == [1, 1]


def test_logits_only_where_they_are_wanted() -> None:
    model, ids = build(MAMBA), some_ids(MAMBA, 2, 9)
    wanted = torch.tensor([7, 0, -1])
    assert_same(model(ids, logits_at=wanted).logits, model(ids).logits[:, wanted])
    assert model(ids[:, :0]).logits.shape == (2, 0, 11)


def test_gradients_reach_every_parameter_through_a_state() -> None:
    model, ids = build(HYBRID), some_ids(HYBRID, 2, 12)

    def gradients(cut: int) -> list[Tensor]:
        first = model(ids[:, :cut], return_state=True)
        second = model(ids[:, cut:], first.state)
        total = torch.cat([first.logits, second.logits], 1).square().sum()
        return list(torch.autograd.grad(total, list(model.parameters())))

    for whole, chunked in zip(gradients(0), gradients(5), strict=True):
        assert_same(chunked, whole)


def test_padding_rows_give_no_logits_and_are_drawn_like_the_others() -> None:
    model = LanguageModel(MAMBA)
    assert model.embedding.weight.shape == (16, 8)
    assert model(some_ids(MAMBA, 1, 3)).logits.shape == (1, 3, 11)
    assert model.embedding.weight[11:].detach().abs().min() > 0


def test_a_model_starts_as_released() -> None:
    config = LanguageModelConfig(d_model=64, n_layer=9, vocab_size=2000)
    model = LanguageModel(config)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for layer in model.backbone.layers:
        widest = layer.mixer.out_proj.weight.abs().max().item()
        assert widest == pytest.approx(1 / math.sqrt(128) / math.sqrt(9), rel=0.01)
        assert layer.mixer.in_proj.weight.abs().max().item() == pytest.approx(1 / math.sqrt(64), rel=0.01)
        assert torch.all(layer.mixer.ssm.dt_bias < math.log(math.expm1(0.1)) + 1e-3)
        assert torch.equal(layer.norm.weight, torch.ones(64))


def test_a_model_built_on_the_meta_device_is_initialised_alike() -> None:
    with torch.device("meta"):
        model = LanguageModel(HYBRID)
    model.to_empty(device="cpu")
    other = LanguageModel(HYBRID)
    for one in (model, other):
        torch.manual_seed(1)
        one.reset_parameters()
    for (name, made), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(made, expected), name


def test_parts_add_up() -> None:
    model = build(HYBRID)
    parts = model.num_parameters()
    assert list(parts) == ["embedding", "positions", "mamba", "mlp", "norms", "head"]
    assert sum(parts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert parts["norms"] == 5 * 2 * 6
    assert parts["head"] == parts["embedding"] == 16 * 6


@pytest.mark.parametrize(("in_fp32", "stream"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_residual_stream_in_low_precision(in_fp32: bool, stream: torch.dtype) -> None:
    config = LanguageModelConfig(d_model=8, n_layer=2, vocab_size=11, residual_in_fp32=in_fp32)
    model = LanguageModel(config).bfloat16()
    seen: list[torch.dtype] = []
    model.backbone.layers[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output[0].dtype))
    logits, state = model(some_ids(config, 1, 5), return_state=True)
    assert seen == [stream]
    assert logits.dtype == torch.bfloat16
    assert set(state.tensors()) == {"position", "bfloat16", "float32"}


def test_autocast_trains_and_resumes() -> None:
    model, ids = LanguageModel(HYBRID), some_ids(HYBRID, 2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(ids, return_state=True)
        resumed, _ = model(ids, state)
        with torch.no_grad():
            stepped, _ = model.step(ids[:, 0], state.clone())
    resumed.float().logsumexp(-1).sum().backward()
    assert logits.dtype == torch.bfloat16
    assert {layer[1].dtype for layer in state.layers if layer} == {torch.float32, torch.complex64}  # of the scans
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(stepped, resumed[:, 0], rtol=2**-5, atol=2**-5)


@pytest.mark.parametrize(("what", "scans"), [("none", 2), ("selective", 2), ("full", 4)])
def test_what_runs_again_changes_no_gradient(what: Recompute, scans: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(MAMBA), some_ids(MAMBA, 2, 6)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(ids).logits.square().sum(), parameters)
    calls: list[int] = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *given: calls.append(1) or forward(*given))
    model.backbone.recompute = what
    gradients = torch.autograd.grad(model(ids).logits.square().sum(), parameters)
    assert len(calls) == scans
    assert all(torch.equal(gradient, want) for gradient, want in zip(gradients, expected, strict=True))


def test_a_copy_is_whole_and_independent() -> None:
    model, ids = build(MAMBA), some_ids(MAMBA, 1, 4)
    logits = model(ids).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(ids).logits, logits)


@pytest.mark.parametrize("what", ["none", "selective"])
def test_a_model_compiles_whole(what: Recompute) -> None:
    """Forward from a state to a state, and backward, as one graph."""
    model, ids = build(MAMBA), some_ids(MAMBA, 2, 6)
    model.backbone.recompute = what
    with torch.no_grad():
        _, before = model(ids, return_state=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, actual = (one(ids, before, return_state=True) for one in (model, compiled))
    assert_same(actual.logits, expected.logits)
    assert_same_states(actual.state, expected.state)
    parameters = list(model.parameters())
    wanted, gradients = (torch.autograd.grad(one.logits.square().sum(), parameters) for one in (expected, actual))
    for gradient, want in zip(gradients, wanted, strict=True):
        assert_same(gradient, want)


def test_a_step_compiles_whole() -> None:
    model, ids = build(MAMBA), some_ids(MAMBA, 2, 4)
    expected = model(ids).logits
    step = torch.compile(model.step, backend="aot_eager", fullgraph=True)
    state = model.init_state(2)
    with torch.no_grad():
        for t in range(4):
            logits, state = step(ids[:, t], state)
            assert_same(logits, expected[:, t])
    assert state.position.tolist() == [4, 4]


def test_what_does_not_fit_is_told() -> None:
    model = LanguageModel(HYBRID)
    ids, state = some_ids(HYBRID, 2, 3), model.init_state(3)
    with pytest.raises(UserError, match=r"ids must have the shape \(B, L\), got \(3,\)"):
        model(ids[0])
    with pytest.raises(UserError, match="a slot for each of the 2 sequences, got 3"):
        model(ids, state)
    with pytest.raises(UserError, match=r"ids must have the shape \(B, L\), got \(3,\)"):
        model.prefill(ids[0])
    with pytest.raises(UserError, match=r"ids of the shape \(B,\), got \(2, 3\)"):
        model.step(ids, state)
    with pytest.raises(UserError, match="2 tokens for a state of 3 slots"):
        model.step(ids[:, 0], state)
    with pytest.raises(UserError, match="at least one token"):
        model.prefill(ids[:, :0])
    with pytest.raises(UserError, match="below vocab_size = 13, got 13"):
        model(torch.tensor([[1, 13]]))
    with pytest.raises(UserError, match="64 positions, got a text of 65"):
        model(some_ids(HYBRID, 1, 65))


@every_model
def test_bounds_and_slots_are_checked(config: LanguageModelConfig) -> None:
    """Also where no mixer looks at them, and before a table of positions does."""
    model, ids = LanguageModel(config), some_ids(config, 1, 5)
    for call in (model, model.prefill):
        for bounds in ([0, 3], [0, 7], [0, 4, 3, 5]):
            with pytest.raises(ValueError, match="cu_seqlens is .* from 0 to L = 5"):
                call(ids, cu_seqlens=torch.tensor(bounds))
        with pytest.raises(ValueError, match="packed sequences lie in one row"):
            call(ids.expand(2, -1), cu_seqlens=torch.tensor([0, 5]))
    for slots, sentence in (([1, 1], "a different slot for each row"), ([0, 3], "slot 3, but the state has 3")):
        with pytest.raises(ValueError, match=sentence):
            model.step(ids[0, :2], model.init_state(3), state_indices=torch.tensor(slots))


def test_a_step_records_no_gradients() -> None:
    model, ids = build(MAMBA), some_ids(MAMBA, 2, 4)
    logits, state = model.step(ids[:, 0], model.init_state(2))
    assert not logits.requires_grad
    assert not any(tensor.requires_grad for tensor in state.tensors().values())


@every_model
def test_shapes_without_values(config: LanguageModelConfig) -> None:
    model = LanguageModel.outline(config)
    ids = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    logits, state = model(ids, return_state=True)
    assert (logits.shape, logits.device.type) == ((2, 5, config.vocab_size), "meta")
    logits, state = model.step(ids[:, 0], state)
    assert logits.shape == (2, config.vocab_size)
    assert state.position.is_meta
