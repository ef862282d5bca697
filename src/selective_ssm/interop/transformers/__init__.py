"""Models of Hugging Face's transformers on this library's operators, and this library's models in transformers."""

from __future__ import annotations

from selective_ssm.interop.transformers.auto import register
from selective_ssm.interop.transformers.fast_ops import restore_ops, use_fast_ops

__all__ = ["register", "restore_ops", "use_fast_ops"]
