"""llama.cpp itself on what is exported: its tokens, its logits, its texts. ``make test-llamacpp`` builds it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from selective_ssm.data import ByteTokenizer, Tokenizer, TokenizersTokenizer
from selective_ssm.generation import generate
from selective_ssm.interop.gguf import write_gguf
from selective_ssm.layers import MambaConfig, S6Config
from selective_ssm.models import LanguageModel, LanguageModelConfig

PYTHON = os.environ.get("SELECTIVE_SSM_LLAMACPP")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="SELECTIVE_SSM_LLAMACPP names no Python with llama_cpp: make test-llamacpp"),
]

TEXTS = [
    "Hello world, it's a test of 123,456 words.",
    "\t\tdef f(x):\n" + 30 * " " + "return  x\r\n\r\n\n",
    "日本語のテキスト, Привет, é ½ ٣ नमस्ते עברית 👩\u200d👧 ﬁ\u00a0\u3000\u2028\x00\x7f",
    "<|endoftext|> <|padding|> [PAD257] 'LL we're '''",
]
CASES = {
    "plain": (257, MambaConfig()),
    "padded, no bias, norms": (
        300,
        MambaConfig(conv_bias=False, d_conv=3, ssm=S6Config(d_state=8, dt_rank=5, norm_eps=1e-5, skip=False)),
    ),
}
ROUNDED = ("embedding", "head", "in_proj", "x_proj", "dt_proj", "out_proj")
"""The matrices, which a file in 16 bits holds in 16 bits."""

ALLOWED = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Of the largest logit. What a matrix of 16 bits is multiplied by is rounded to its dtype there, and not here."""


def build(vocab_size: int, block: MambaConfig, *, tied: bool) -> LanguageModel:
    model = LanguageModel(
        LanguageModelConfig(d_model=32, n_layer=2, vocab_size=vocab_size, pattern=(block,), tie_embeddings=tied)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def ask(path: Path, continued: int) -> list[dict[str, Any]]:
    assert PYTHON is not None
    question = json.dumps({"model": str(path), "texts": TEXTS, "continued": continued})
    script = Path(__file__).with_name("llamacpp.py")
    told = subprocess.run([PYTHON, str(script)], input=question, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout)


@torch.no_grad()
def compare(model: LanguageModel, tokenizer: Tokenizer, path: Path, dtype: torch.dtype) -> None:
    """Write the model and ask for the texts; ours answers in fp32 with the weights that were written."""
    write_gguf(model, path, tokenizer, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in ROUNDED:
            parameter.copy_(parameter.to(dtype))
    for text, answer in zip(TEXTS, ask(path, continued=64), strict=True):
        ids = [tokenizer.end, *tokenizer.encode(text)]
        assert answer["ids"] == ids, text
        assert bytes(answer["back"]).decode() == text
        logits = model(torch.tensor([ids])).logits[0, -1]
        error = (torch.tensor(answer["logits"]) - logits).abs().max() / logits.abs().max()
        assert error <= ALLOWED[dtype], text
        if dtype == torch.float32:
            assert answer["written"] == generate(model, [ids], max_new_tokens=64, temperature=0.0)[0].ids


@pytest.mark.parametrize("dtype", list(ALLOWED))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_bytes(case: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    compare(build(*CASES[case], tied=tied), ByteTokenizer(), tmp_path / "model.gguf", dtype)


def test_gpt_neox(data: Path, tmp_path: Path) -> None:
    tokenizer = TokenizersTokenizer.from_file(data / "gpt_neox_tokenizer" / "20B_tokenizer.json")
    compare(build(50280, MambaConfig(), tied=True), tokenizer, tmp_path / "model.gguf", torch.float32)
