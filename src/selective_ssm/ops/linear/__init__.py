"""A matrix times few vectors, where reading the matrix is what takes time; see `op`."""

from selective_ssm.ops.linear.op import linear

__all__ = ["linear"]
