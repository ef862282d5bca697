"""The residual stream's add and the RMSNorm after it, in one pass over memory: `add_rms_norm`."""

from selective_ssm.ops.add_rms_norm.op import add_rms_norm

__all__ = ["add_rms_norm"]
