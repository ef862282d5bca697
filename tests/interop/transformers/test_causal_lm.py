"""Our checkpoints in transformers: the same model, through its own doors."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from selective_ssm import LanguageModel, LanguageModelConfig, MambaConfig, MLPConfig, S4DConfig, generate
from selective_ssm.data import ByteTokenizer
from selective_ssm.errors import UserError
from selective_ssm.interop.transformers import register
from selective_ssm.tasks.language import next_token_loss
from tests.interop.transformers.models import shake
from tests.interop.transformers.test_fast_ops import ROWS, adapted, far, losses, padded, some_ids, with_adapters

CONFIGS = {
    "tied": LanguageModelConfig(d_model=16, n_layer=2, vocab_size=50),
    "untied": LanguageModelConfig(d_model=16, n_layer=2, vocab_size=50, tie_embeddings=False, residual_in_fp32=False),
    "hybrid": LanguageModelConfig(
        d_model=16,
        n_layer=3,
        vocab_size=50,
        norm="layer",
        max_positions=40,
        pattern=(MambaConfig(bias=True), MLPConfig(), MambaConfig(ssm=S4DConfig())),
    ),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


def saved(name: str, folder: Path) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(CONFIGS[name]).eval()
    shake(model)
    model.save_pretrained(folder)
    return model


def both(name: str, folder: Path) -> tuple[LanguageModel, Any]:
    return saved(name, folder), AutoModelForCausalLM.from_pretrained(folder)


@every_config
def test_a_folder_is_read_and_written_as_it_is(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = LanguageModel.from_pretrained(tmp_path / "theirs")
    assert again.config == ours.config == AutoConfig.from_pretrained(tmp_path / "theirs").language_model
    written = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")]
    assert written[0].items() <= written[1].items()
    before, after = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert theirs.config.vocab_size == 50
    assert theirs.config.hidden_size == 16


@every_config
def test_the_same_logits_and_loss(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path)
    ids = some_ids(2, 13)
    expected = ours(ids).logits
    out = theirs(ids, labels=ids)
    assert far(out.logits, expected) <= 1e-6
    assert torch.allclose(out.loss, next_token_loss(expected[:, :-1], ids[:, 1:]))
    assert far(theirs(ids, logits_to_keep=3).logits, expected[:, -3:]) <= 1e-6
    assert far(theirs(ids, logits_to_keep=torch.tensor([4, 1])).logits, expected[:, [4, 1]]) <= 1e-6
    assert far(theirs(ids, return_dict=False)[0], expected) <= 1e-6


@every_config
def test_gradients_with_and_without_recomputation(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path)
    ids = some_ids(2, 13)
    next_token_loss(ours(ids).logits[:, :-1], ids[:, 1:]).backward()
    for checkpointing in (False, True):
        theirs.zero_grad()
        if checkpointing:
            theirs.activation_checkpointing_enable()
        assert theirs.is_activation_checkpointing is checkpointing
        theirs.train()(ids, labels=ids).loss.backward()
        for (key, one), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            assert far(one.grad, other.grad) <= 1e-5 * other.grad.abs().max(), key
    theirs.activation_checkpointing_disable()
    assert theirs.backbone.recompute == "none"


@every_config
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_changes_nothing(name: str, side: str, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path)
    ids, mask = padded(ROWS, side)
    with torch.no_grad():
        out = theirs(ids, attention_mask=mask)
        last = theirs(ids, attention_mask=mask, logits_to_keep=1).logits
        going_on = theirs(some_ids(3, 4), past_key_values=out.past_key_values).logits
        for row, own in enumerate(ROWS):
            alone = ours(torch.cat((own, some_ids(3, 4)[row]))[None]).logits[0]
            assert far(out.logits[row, mask[row] == 1], alone[: len(own)]) <= 1e-5
            assert far(going_on[row], alone[len(own) :]) <= 1e-5
            if side == "left":
                assert far(last[row, 0], alone[len(own) - 1]) <= 1e-5


@every_config
@pytest.mark.parametrize("pieces", [(8, 4), (1, 2, 9), (5, 1, 1, 5)], ids=str)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_tokens_go_on_from_a_cache(name: str, pieces: tuple[int, ...], with_gradients: bool, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path)
    ids, cache, read = some_ids(2, 12), None, []
    with torch.set_grad_enabled(with_gradients):
        for piece in ids.split(pieces, dim=1):
            out = theirs(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            read.append(out.logits)
    assert far(torch.cat(read, dim=1), ours(ids).logits) <= 1e-5
    assert cache.get_seq_length() == 12


def test_sequences_may_be_packed_as_transformers_collators_do(tmp_path: Path) -> None:
    ours, theirs = both("hybrid", tmp_path)
    offsets = torch.tensor([0, 4, 9, 13])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2, 3]])
    expected = ours(some_ids(1, 13), cu_seqlens=offsets).logits
    for told in ({"cu_seq_lens_q": offsets}, {"position_ids": positions}):
        out = theirs(some_ids(1, 13), **told)
        assert torch.equal(out.logits, expected)
        assert out.past_key_values is None
    alone = theirs(some_ids(1, 13), position_ids=torch.arange(13)[None]).logits
    assert far(alone, ours(some_ids(1, 13)).logits) <= 1e-6


@every_config
def test_the_body_and_the_head_are_the_model(name: str, tmp_path: Path) -> None:
    theirs = both(name, tmp_path)[1]
    ids, mask = padded(ROWS, "left")
    head = theirs.get_output_embeddings()
    logits = theirs(ids, attention_mask=mask).logits
    made = head(theirs.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state)
    assert far(made[mask == 1][:, :50], logits[mask == 1]) <= 1e-6
    made.sum().backward()
    assert head.weight.grad is not None
    assert any(head.weight is one for one in theirs.parameters())
    assert not theirs.supports_tp_plan


def test_generate_writes_what_ours_writes(tmp_path: Path) -> None:
    ours, theirs = both("hybrid", tmp_path)
    ids, mask = padded(ROWS, "left")
    together = theirs.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for row, own in enumerate(ROWS):
        assert together[row, -8:].tolist() == generate(ours, own.tolist(), max_new_tokens=8, temperature=0)[0].ids
    again = theirs.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(again, together)


def best_beams(model: LanguageModel, prompt: Tensor, beams: int, steps: int) -> list[int]:
    """The likeliest text a beam search finds when every text is read from its beginning."""
    texts = [(0.0, prompt.tolist())]
    for _ in range(steps):
        grown = []
        for score, text in texts:
            scores = model(torch.tensor([text])).logits[0, -1].log_softmax(-1) + score
            grown += [(value.item(), [*text, token]) for token, value in enumerate(scores)]
        texts = sorted(grown, reverse=True)[:beams]
    return texts[0][1]


@pytest.mark.parametrize("name", ["tied", "hybrid"])
def test_a_beam_search_carries_each_beams_state(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path)
    prompt = some_ids(6)
    mask = torch.ones(1, 6)
    written = theirs.generate(prompt[None], attention_mask=mask, max_new_tokens=6, num_beams=3, do_sample=False)
    with torch.no_grad():
        assert written[0].tolist() == best_beams(ours, prompt, 3, 6)


def test_a_conversation_goes_on_from_its_cache(tmp_path: Path) -> None:
    theirs = both("hybrid", tmp_path)[1]
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = theirs.generate(some_ids(1, 5), **options)
    more = torch.cat((first.sequences, some_ids(1, 3)), dim=1)
    again = theirs.generate(more, past_key_values=first.past_key_values, **options)
    assert torch.equal(again.sequences, theirs.generate(more, **options).sequences)
    assert again.past_key_values.get_seq_length() == 5 + 4 + 3 + 4 - 1
    with pytest.raises(UserError, match="cannot be taken back"):
        again.past_key_values.crop(-1)


def test_it_is_copied_and_pickled(tmp_path: Path) -> None:
    theirs = both("tied", tmp_path)[1]
    ids = some_ids(1, 9)
    for one in (copy.deepcopy(theirs), pickle.loads(pickle.dumps(theirs))):
        assert torch.equal(one(ids).logits, theirs(ids).logits)
        with torch.no_grad():
            one.embedding.weight.zero_()
        assert one(ids).logits.abs().max() == 0 < theirs(ids).logits.abs().max()


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_more_tokens_can_be_added(name: str, tmp_path: Path) -> None:
    theirs = both(name, tmp_path)[1]
    ids = some_ids(1, 9)
    before = theirs(ids).logits
    theirs.resize_token_embeddings(53)
    assert torch.equal(theirs(ids).logits[..., :50], before)
    theirs(torch.tensor([[52]]))
    theirs.save_pretrained(tmp_path)
    assert LanguageModel.from_pretrained(tmp_path).config.padded_vocab_size == 53


def test_compiled_it_answers_the_same(tmp_path: Path) -> None:
    theirs = both("tied", tmp_path)[1]
    compiled = torch.compile(theirs, backend="aot_eager", fullgraph=True)
    ids = some_ids(2, 9)
    with torch.no_grad():
        assert far(compiled(ids, use_cache=False).logits, theirs(ids).logits) <= 1e-5


def test_trainer_trains_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    saved("tied", tmp_path)
    rows = [{"input_ids": some_ids(8), "labels": some_ids(8)}] * 8

    def run(steps: int, resume: bool) -> Any:
        settings = TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=rows[:2])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    first, last = run(2, resume=False).evaluate()["eval_loss"], run(4, resume=True).evaluate()["eval_loss"]
    assert last < first
    assert LanguageModel.from_pretrained(tmp_path / "run" / "checkpoint-4").config == CONFIGS["tied"]


@with_adapters
def test_adapters_learn(tmp_path: Path) -> None:
    ours, theirs = both("untied", tmp_path)
    model = adapted(theirs, "in_proj", "x_proj", "dt_proj", "out_proj", "embedding", "head")
    found = losses(model)
    assert found[-1] < found[0]
    slopes = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    assert len(slopes) == 2 * (2 * 4 + 2)
    assert all(slope.abs().max() > 0 for slope in slopes.values())
    merged = copy.deepcopy(model).merge_and_unload()
    ids = some_ids(1, 9)
    assert far(merged.eval()(ids).logits, model.eval()(ids).logits) <= 1e-5
    assert far(merged(ids).logits, ours(ids).logits) > 1e-3


def test_pipeline_writes_and_stops_at_the_boundary(tmp_path: Path) -> None:
    torch.manual_seed(0)
    LanguageModel(LanguageModelConfig(d_model=16, n_layer=2, vocab_size=257)).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    writer = pipeline("text-generation", model=str(tmp_path))
    assert writer.model.generation_config.eos_token_id == 256
    assert writer("abc", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("abc")
    many = writer(["a", "longer text"], batch_size=2, max_new_tokens=4, do_sample=False)
    alone = writer("a", max_new_tokens=4, do_sample=False)
    assert many[0] == alone


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    saved("tied", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    ByteTokenizer().save(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: ...\nclass Model: ...\nclass T: ...\n")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__module__.startswith("selective_ssm.")
    assert AutoTokenizer.from_pretrained(tmp_path)("a").input_ids == [97]
    assert not ran.exists()


def test_bad_folders_and_arguments_are_refused_in_words(tmp_path: Path) -> None:
    theirs = both("tied", tmp_path)[1]
    ids = some_ids(1, 4)
    with pytest.raises(UserError, match="knows no inputs_embeds"):
        theirs(inputs_embeds=torch.zeros(1, 4, 16))
    with pytest.raises(UserError, match=r"input_ids must have the shape \(B, L\), got \(4,\)"):
        theirs(ids[0])
    weights = load_file(tmp_path / "model.safetensors")
    weights["other"] = weights.pop("backbone.norm_f.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"do not fit their config; missing: backbone.norm_f.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["config"]["d_modle"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="d_modle"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
