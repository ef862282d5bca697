"""Models of Hugging Face's transformers on this library's operators."""

from __future__ import annotations

from selective_ssm.interop.transformers.fast_ops import restore_ops, use_fast_ops

__all__ = ["restore_ops", "use_fast_ops"]
