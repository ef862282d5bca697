"""The tokenizers of checkpoints as transformers' own."""

from __future__ import annotations

from typing import Any, ClassVar

from selective_ssm.data import ByteTokenizer

_Base: Any = object  # transformers' tokenizer, not known here as it need not be installed
_END = "<|endoftext|>"


class TokenizerPart(_Base):
    """What stands before transformers' tokenizer in a class of both: bytes as they are, 256 the boundary.

    Args:
        eos_token: how the boundary is written.
        pad_token: the same, since nothing reads padding.
        kind: what `load_tokenizer` knows a folder with such a tokenizer by.
        **kwargs: as in transformers.
    """

    model_input_names: ClassVar = ["input_ids", "attention_mask"]

    def __init__(self, eos_token: str = _END, pad_token: str = _END, kind: str = "bytes", **kwargs: Any) -> None:
        super().__init__(eos_token=eos_token, pad_token=pad_token, kind=kind, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read the tokenizer of a checkpoint: bytes, or the ``tokenizer.json`` there, which transformers know."""
        from transformers import PreTrainedTokenizerFast
        from transformers.models.auto.tokenization_auto import get_tokenizer_config

        if get_tokenizer_config(pretrained_model_name_or_path, **kwargs).get("kind") == "bytes":
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @property
    def vocab_size(self) -> int:
        """How many ids there are beside the boundary."""
        return ByteTokenizer.end

    def get_vocab(self) -> dict[str, int]:
        return {chr(byte): byte for byte in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [chr(byte) for byte in ByteTokenizer().encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens, U+FFFD where they are no UTF-8."""
        added = self.added_tokens_encoder
        return b"".join(token.encode("utf-8" if token in added else "latin-1") for token in tokens).decode(
            errors="replace"
        )

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()
