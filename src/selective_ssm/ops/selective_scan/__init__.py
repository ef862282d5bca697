"""The selective scan: `selective_scan` over a sequence, `selective_scan_step` over a token."""

from selective_ssm.ops.selective_scan.op import selective_scan, selective_scan_fn, selective_scan_step

__all__ = ["selective_scan", "selective_scan_fn", "selective_scan_step"]
