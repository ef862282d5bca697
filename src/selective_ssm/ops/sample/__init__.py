"""Choosing the next token, as one operator: `sample`."""

from selective_ssm.ops.sample.op import sample

__all__ = ["sample"]
