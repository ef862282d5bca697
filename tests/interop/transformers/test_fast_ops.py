"""Models of transformers answer the same on this library's operators, and rightly where their own path does not."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

from selective_ssm.errors import UserError
from selective_ssm.interop.transformers import restore_ops, use_fast_ops
from tests.interop.transformers.models import CASES, VOCABULARY, model_of, some_ids

every_case = pytest.mark.parametrize("case", CASES)
every_family = pytest.mark.parametrize("case", ["mamba, biases", "falcon, biases"])


def both(case: str) -> tuple[Any, Any]:
    theirs = model_of(case)
    return theirs, use_fast_ops(copy.deepcopy(theirs))


def far(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_logits(case: str, dtype: torch.dtype) -> None:
    theirs, fast = (model.to(dtype) for model in both(case))
    ids = some_ids(2, 37)
    with torch.no_grad():
        assert far(fast(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits) <= 2e-5


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_further_from_the_truth_in_low_precision(case: str, dtype: torch.dtype) -> None:
    theirs, fast = both(case)
    ids = some_ids(2, 37)
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(ids).logits.double()
        own, ours = (model.to(dtype)(ids).logits.double() for model in (theirs, fast))
    assert far(ours, exact) <= 2 * far(own, exact)


@every_case
def test_the_same_gradients(case: str) -> None:
    models = both(case)
    ids = some_ids(2, 21)
    for model in models:
        model.train()(ids, labels=ids).loss.backward()
    theirs, fast = (dict(model.named_parameters()) for model in models)
    for name, parameter in theirs.items():
        expected, found = parameter.grad, fast[name].grad
        assert expected.abs().max() > 0, name
        assert far(found, expected) <= 1e-5 * expected.abs().max() + 1e-7, name


@every_family
@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "top_k": 20}, {"do_sample": False, "num_beams": 3}],
    ids=["greedy", "sampled", "beams"],
)
def test_generate_writes_the_same(case: str, options: dict[str, Any]) -> None:
    ids, written = some_ids(2, 9), []
    for model in both(case):
        torch.manual_seed(3)
        written.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **options))
    assert torch.equal(*written)
    assert len(set(written[0][:, 9:].flatten().tolist())) > 2


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """The rows in a batch with padding at a side or, for "between", in the middle; and the mask."""
    length = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.int64)
    for row, own in enumerate(rows):
        places = torch.arange(len(own))
        if side == "left":
            places += length - len(own)
        if side == "between":
            places[len(own) // 2 :] += length - len(own)
        ids[row, places], mask[row, places] = own, 1
    return ids, mask


ROWS = [some_ids(11), some_ids(2), some_ids(7)]


@every_family
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_changes_nothing(case: str, side: str) -> None:
    theirs, fast = both(case)
    ids, mask = padded(ROWS, side)
    with torch.no_grad():
        out = fast(ids, attention_mask=mask, use_cache=True)
        going_on = fast(some_ids(3, 4), cache_params=out.cache_params).logits
        for row, own in enumerate(ROWS):
            alone = theirs(torch.cat((own, some_ids(3, 4)[row]))[None]).logits[0]
            assert far(out.logits[row, mask[row] == 1], alone[: len(own)]) <= 2e-5
            assert far(going_on[row], alone[len(own) :]) <= 2e-5


@every_family
def test_padding_and_more_tokens_are_where_transformers_own_path_goes_wrong(case: str) -> None:
    theirs = model_of(case)
    ids, mask = padded(ROWS, "left")
    with torch.no_grad():
        whole = theirs(ROWS[1][None]).logits[0]
        assert far(theirs(ids, attention_mask=mask).logits[1, mask[1] == 1], whole) > 1e-1
        whole = theirs(torch.cat((ROWS[1], some_ids(1)))[None]).logits[0]
        ids, mask = padded(ROWS, "right")
        cache = theirs(ids, attention_mask=mask, use_cache=True).cache_params
        assert far(theirs(some_ids(1).expand(3, 1), cache_params=cache).logits[1], whole[-1:]) > 1e-1
        whole = theirs(some_ids(1, 12)).logits
        cache = theirs(some_ids(1, 12)[:, :8], use_cache=True).cache_params
        assert far(theirs(some_ids(1, 12)[:, 8:], cache_params=cache).logits, whole[:, 8:]) > 1e-2


@every_family
def test_prompts_of_several_lengths_are_written_on_as_each_alone(case: str) -> None:
    fast = use_fast_ops(model_of(case))
    ids, mask = padded(ROWS, "left")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = fast.generate(ids, attention_mask=mask, **options)
    for row, own in enumerate(ROWS):
        alone = fast.generate(own[None], attention_mask=torch.ones_like(own)[None], **options)
        assert together[row, -8:].tolist() == alone[0, -8:].tolist()


@every_case
@pytest.mark.parametrize("pieces", [(8, 4), (1, 2, 9), (5, 1, 1, 5)], ids=str)
def test_tokens_go_on_from_a_cache_as_in_one_sequence(case: str, pieces: tuple[int, ...]) -> None:
    theirs, fast = both(case)
    ids = some_ids(2, 12)
    cache = DynamicCache(config=fast.config)
    with torch.no_grad():
        read = [fast(piece, cache_params=cache, use_cache=True).logits for piece in ids.split(pieces, dim=1)]
        assert far(torch.cat(read, dim=1), theirs(ids).logits) <= 2e-5


@every_family
def test_a_mask_with_a_cache_may_cover_what_the_cache_has_read(case: str) -> None:
    fast = use_fast_ops(model_of(case))
    ids, mask = some_ids(1, 8), torch.tensor([[1, 1, 1, 1, 1, 1, 0, 1]])
    with torch.no_grad():
        whole = fast(ids[mask == 1][None]).logits
        cache = fast(ids[:, :5], use_cache=True).cache_params
        rest = fast(ids[:, 5:], cache_params=cache, attention_mask=mask).logits
    assert far(rest[:, mask[0, 5:] == 1], whole[:, 5:]) <= 2e-5
    with pytest.raises(UserError, match="attention_mask has the shape"):
        fast(ids, attention_mask=mask[:, :7])


@every_family
def test_gradients_reach_through_the_cache(case: str) -> None:
    theirs, fast = both(case)
    ids = some_ids(2, 12)
    theirs.train()(ids).logits.square().sum().backward()
    cache = DynamicCache(config=fast.config)
    read = [fast(piece, cache_params=cache, use_cache=True).logits for piece in ids.split((6, 1, 5), dim=1)]
    torch.cat(read, dim=1).square().sum().backward()
    for (name, one), other in zip(fast.named_parameters(), theirs.parameters(), strict=True):
        assert far(one.grad, other.grad) <= 1e-4 * other.grad.abs().max(), name


@every_family
@pytest.mark.parametrize("fast_first", [True, False])
def test_either_path_goes_on_from_the_others_cache(case: str, fast_first: bool) -> None:
    theirs, fast = both(case)
    first, second = (fast, theirs) if fast_first else (theirs, fast)
    ids = some_ids(2, 12)
    with torch.no_grad():
        cache = first(ids[:, :10], use_cache=True).cache_params
        first(ids[:, 10:11], cache_params=cache)
        assert far(second(ids[:, 11:], cache_params=cache).logits, theirs(ids).logits[:, 11:]) <= 2e-5


@every_family
def test_only_this_instance_changes_and_it_changes_back(case: str) -> None:
    theirs, fast = both(case)
    names = list(theirs.state_dict())
    classes = [type(module) for module in theirs.modules()]
    assert list(use_fast_ops(fast).state_dict()) == names
    assert [type(module) for module in theirs.modules()] == classes != [type(module) for module in fast.modules()]
    assert [type(module) for module in restore_ops(fast).modules()] == classes
    assert [type(module) for module in restore_ops(fast).modules()] == classes


@every_family
def test_it_is_copied_pickled_and_saved_as_any_model(case: str, tmp_path: Any) -> None:
    fast, ids = use_fast_ops(model_of(case)), some_ids(1, 9)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    copies = copy.deepcopy(fast), torch.load(file, weights_only=False)
    fast.save_pretrained(tmp_path)
    loaded = type(fast).from_pretrained(tmp_path)
    with torch.no_grad():
        for one in (*copies, use_fast_ops(loaded)):
            assert [type(module) for module in one.modules()] == [type(module) for module in fast.modules()]
            assert torch.equal(one(ids).logits, fast(ids).logits)


@every_family
def test_hooks_of_accelerate_do_not_keep_the_old_path(case: str) -> None:
    theirs, fast = model_of(case), model_of(case)
    for layer in fast.backbone.layers:
        add_hook_to_module(layer.mixer, ModelHook())
    ids, mask = padded(ROWS, "left")
    with torch.no_grad():
        expected = use_fast_ops(theirs)(ids, attention_mask=mask).logits
        assert torch.equal(use_fast_ops(fast)(ids, attention_mask=mask).logits, expected)


def losses(model: Any, steps: int = 20) -> list[float]:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=3e-3)
    found = []
    for step in range(steps):
        ids = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(step % 4))
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@every_family
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_run_takes_the_same_course(case: str, checkpointing: bool) -> None:
    theirs, fast = both(case)
    if checkpointing:
        fast.activation_checkpointing_enable()
    own, ours = (losses(model.train()) for model in (theirs, fast))
    assert own[-1] < 0.9 * own[0]
    assert ours == pytest.approx(own, rel=1e-4)


with_adapters = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(model: Any, *targets: str) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM")).train()


@with_adapters
@every_family
def test_adapters_learn_the_same(case: str) -> None:
    theirs, fast = both(case)
    before = adapted(fast, "in_proj", "x_proj")
    after = use_fast_ops(adapted(copy.deepcopy(theirs), "in_proj", "x_proj"))
    found = [losses(model) for model in (adapted(theirs, "in_proj", "x_proj"), before, after)]
    assert found[1] == found[2] == pytest.approx(found[0], rel=1e-4)
    assert found[0][-1] < found[0][0]
    assert all(parameter.grad.abs().max() > 0 for parameter in before.parameters() if parameter.requires_grad)


@with_adapters
@every_family
def test_an_adapter_on_dt_proj_is_heard(case: str) -> None:
    model, ids = use_fast_ops(adapted(model_of(case), "dt_proj")), some_ids(1, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    slopes = [parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name]
    assert slopes
    assert all(slope.abs().max() > 0 for slope in slopes)


def test_compiled_it_answers_the_same() -> None:
    fast = use_fast_ops(model_of("falcon, biases"))
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    ids, mask = padded(ROWS, "left")
    with torch.no_grad():
        expected = fast(ids, attention_mask=mask).logits
        assert far(compiled(ids, attention_mask=mask, use_cache=False).logits, expected) <= 2e-5
        cache = fast(ids[:, :-1], use_cache=True).cache_params
        expected = fast(ids[:, -1:], cache_params=copy.deepcopy(cache)).logits
        assert far(compiled(ids[:, -1:], cache_params=cache).logits, expected) <= 2e-5


def test_what_is_no_mamba_is_refused() -> None:
    other = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    for model in (other, nn.Linear(2, 2)):
        for function in (use_fast_ops, restore_ops):
            with pytest.raises(UserError, match=f"needs a MambaForCausalLM .* got a {type(model).__name__}, "):
                function(model)
