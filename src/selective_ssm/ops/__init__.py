"""Functions on tensors: scan, convolution, RWKV's average, their steps; an add and a norm; linear; the next token."""

import torch

from selective_ssm.ops.add_rms_norm import add_rms_norm
from selective_ssm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from selective_ssm.ops.linear import linear
from selective_ssm.ops.sample import sample
from selective_ssm.ops.selective_scan import selective_scan, selective_scan_fn, selective_scan_step
from selective_ssm.ops.wkv import wkv

EXPENSIVE = (torch.ops.selective_ssm.selective_scan.default, torch.ops.selective_ssm.wkv.default)
"""Registered operators whose results are worth their memory where a forward pass is run again for its backward."""

__all__ = [
    "EXPENSIVE",
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_step",
    "linear",
    "sample",
    "selective_scan",
    "selective_scan_fn",
    "selective_scan_step",
    "wkv",
]
