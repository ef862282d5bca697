"""Text for language models: tokenizers, sources, a token cache, and batches that are a function of the step."""

from selective_ssm.data.config import DataConfig
from selective_ssm.data.loader import Batch, TextBatches
from selective_ssm.data.sources import Document, describe_source, documents
from selective_ssm.data.split import held_out_documents
from selective_ssm.data.tokenizers import ByteTokenizer, Tokenizer, TokenizersTokenizer, load_tokenizer, tokenizer_from

__all__ = [
    "Batch",
    "ByteTokenizer",
    "DataConfig",
    "Document",
    "TextBatches",
    "Tokenizer",
    "TokenizersTokenizer",
    "describe_source",
    "documents",
    "held_out_documents",
    "load_tokenizer",
    "tokenizer_from",
]
