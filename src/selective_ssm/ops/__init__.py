"""Functions on tensors: the selective scan, the causal convolution, and their one-token steps."""

from selective_ssm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from selective_ssm.ops.selective_scan import selective_scan, selective_scan_fn, selective_scan_step

__all__ = ["causal_conv1d", "causal_conv1d_step", "selective_scan", "selective_scan_fn", "selective_scan_step"]
