"""What is timed is what is said: shapes, and a baseline that computes the same."""

from __future__ import annotations

import torch

from selective_ssm.bench import cases
from selective_ssm.bench.cases import OpCase, conv_inputs, scan_inputs, scan_options
from selective_ssm.bench.gpu import cases as gpu_cases
from selective_ssm.bench.loop import scan_by_doubling, scan_loop
from selective_ssm.ops import causal_conv1d, selective_scan

CPU = torch.device("cpu")
SMALL = OpCase(batch=2, length=9, channels=4, states=3)


def test_the_baselines_compute_the_scan() -> None:
    inputs = {name: tensor.double() for name, tensor in scan_inputs(SMALL, CPU).items()}
    expected = selective_scan(**inputs, delta_softplus=True)
    for baseline in (scan_loop, scan_by_doubling):
        torch.testing.assert_close(baseline(**inputs), expected, rtol=1e-9, atol=1e-12)


def test_a_row_is_cut_at_the_same_places_each_time() -> None:
    (packed,) = (case for case in gpu_cases.SCAN if case.sequences)
    offsets = scan_options(packed, CPU)["cu_seqlens"]
    assert len(offsets) == 65
    assert (offsets[0], offsets[-1]) == (0, packed.length)
    assert offsets.diff().min() > 0
    assert torch.equal(offsets, scan_options(packed, CPU)["cu_seqlens"])
    assert packed.elements == gpu_cases.SCAN[0].elements


def test_inputs_have_the_shapes_of_the_case() -> None:
    assert causal_conv1d(**conv_inputs(SMALL, CPU)).shape == (2, 9, 4)
    assert conv_inputs(SMALL, CPU)["weight"].shape == (4, 4)
    token = OpCase(batch=2, length=1, channels=4, states=3)
    assert scan_inputs(token, CPU)["u"].shape == (2, 4)


def test_names_tell_the_cases_of_a_subject_apart() -> None:
    on_gpu = (gpu_cases.SCAN, gpu_cases.CONV, gpu_cases.NORM, gpu_cases.STEP, gpu_cases.BLOCKS, gpu_cases.LENGTHS)
    models_on_gpu = (gpu_cases.NEIGHBOURS, gpu_cases.MODEL, gpu_cases.DECODE, gpu_cases.GENERATE)
    for subject in (cases.SCAN, cases.CONV, cases.STEP, cases.MODEL, *on_gpu, *models_on_gpu):
        assert len({case.name for case in subject}) == len(subject)
    assert {"1x2048x64x16", "2x512x256x16"} <= {case.name for case in cases.SCAN if case.against_loop}
