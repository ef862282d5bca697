"""RWKV's average over the past: `wkv`, a token a row by `wkv_step`, and the state before the first, `no_average`."""

from selective_ssm.ops.wkv.op import wkv
from selective_ssm.ops.wkv.step import wkv_step
from selective_ssm.ops.wkv.sums import no_average

__all__ = ["no_average", "wkv", "wkv_step"]
