"""The causal depthwise convolution: `causal_conv1d` over a sequence, `causal_conv1d_step` over a token."""

from selective_ssm.ops.causal_conv1d.op import causal_conv1d, causal_conv1d_step

__all__ = ["causal_conv1d", "causal_conv1d_step"]
