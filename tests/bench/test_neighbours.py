"""Mixers beside public forms of them: the same map, timed in the same rows."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from selective_ssm.bench.cases import Setup
from selective_ssm.bench.gpu import neighbour_peers
from selective_ssm.bench.gpu.cases import NEIGHBOURS, NeighbourCase
from selective_ssm.bench.gpu.neighbour_peers import public_forms
from selective_ssm.bench.gpu.neighbours import neighbours, products
from selective_ssm.bench.memory import peak
from selective_ssm.layers import (
    MIXERS,
    S4,
    AttentionConfig,
    H3Config,
    HyenaConfig,
    HyenaFilterConfig,
    Mamba,
    MambaConfig,
    Mixer,
    MixerConfig,
    MLPConfig,
    PlainConfig,
    RetNetConfig,
    RWKVConfig,
    S4Config,
    S4DConfig,
    build_mixer,
)
from selective_ssm.layers.diagonal import as_pairs, diagonal, pairs_as_complex
from selective_ssm.layers.dplr import DPLR, raised
from selective_ssm.ops import native

SETUP = Setup(device=torch.device("cpu"), rounds=1, peers=("sdpa", "fla", "torch"))
WIDTH, LENGTH = 8, 12

_FILTER = HyenaFilterConfig(filter_length=LENGTH, bands=2, hidden=4, depth=2, sine_frequency=1.0)
BY_PEER: dict[str, tuple[MixerConfig, ...]] = {
    "sdpa": (AttentionConfig(n_heads=2, positions="rope"),),
    "fla": (RetNetConfig(n_heads=2), RWKVConfig()),
    "torch": (
        MambaConfig(ssm=S4DConfig(d_state=4)),
        MambaConfig(ssm=S4Config(d_state=4)),
        MambaConfig(ssm=_FILTER),
        PlainConfig(ssm=S4Config(d_state=4, skip=False)),
        H3Config(d_shift=4, ssm=S4DConfig(d_state=4)),
        HyenaConfig(filter=_FILTER),
    ),
}


@pytest.fixture(autouse=True)
def without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch stands in for the CUDA kernels."""
    monkeypatch.setattr(native, "explain", lambda: "it is not what is timed here")


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recurrences that flash-linear-attention's functions compute, with their arguments, for want of a GPU."""

    def chunk_retention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        decay = (1 - 2.0 ** (-5 - torch.arange(q.shape[2], dtype=q.dtype)))[:, None, None]
        state, outs = torch.zeros(1), list[Tensor]()
        for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):
            state = decay * state + k_t[..., None] * v_t[..., None, :]
            outs.append((q_t[..., None, :] @ state)[..., 0, :] / math.sqrt(q.shape[-1]))
        return torch.stack(outs, 1), None

    def fused_recurrent_rwkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta, eps = state[:, :, 0].unbind(1)
        alpha, beta, outs = alpha * eps.exp(), beta * eps.exp(), list[Tensor]()
        for k_t, v_t in zip(k.unbind(1), v.unbind(1), strict=True):
            own, kept = (u + k_t).exp(), (-w.exp()).exp()
            outs.append((alpha + own * v_t) / (beta + own))
            alpha, beta = kept * alpha + k_t.exp() * v_t, kept * beta + k_t.exp()
        return torch.stack(outs, 1), state

    functions = SimpleNamespace(chunk_retention=chunk_retention, fused_recurrent_rwkv4=fused_recurrent_rwkv4)
    monkeypatch.setattr(neighbour_peers, "imported", lambda module: functions)


@pytest.mark.usefixtures("fla")
@pytest.mark.parametrize(("peer", "config"), [(peer, config) for peer in BY_PEER for config in BY_PEER[peer]])
def test_a_public_form_is_the_same_map(peer: str, config: MixerConfig) -> None:
    mixer = build_mixer(config, WIDTH).double()
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    theirs = copy.deepcopy(mixer)
    _truncate(theirs)
    form = public_forms(theirs, x)[peer]
    assert form is not None
    torch.testing.assert_close(form(x), mixer(x)[0], rtol=1e-9, atol=1e-10)


def _truncate(mixer: Mixer) -> None:
    """Put C̃ = C (I - Ā^L) in the place of S4's C, as public code has it."""
    for s4 in (module for module in mixer.modules() if isinstance(module, S4)):
        P, C = pairs_as_complex(s4.P), pairs_as_complex(s4.C)
        system = DPLR(diagonal(s4.A_log, s4.A_imag), P, C, s4.log_dt.exp()[:, None])
        row = as_pairs(C.conj_physical())
        beyond = raised([power.mT for power in system.powers(LENGTH)], row[None], LENGTH)[0]
        s4.C.data = as_pairs(pairs_as_complex(row - beyond).conj_physical())


def test_what_changes_with_time_has_no_fft() -> None:
    x = torch.randn(1, LENGTH, WIDTH)
    assert not public_forms(build_mixer(MambaConfig(), WIDTH), x)
    assert not public_forms(build_mixer(MLPConfig(), WIDTH), x)


def test_products_are_those_of_every_linear_layer() -> None:
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.bfloat16)
    mixer = build_mixer(MambaConfig(bias=True), WIDTH)
    one = products(mixer, x)
    assert isinstance(mixer, Mamba)
    assert one.call is not None
    rows = [tuple(out.shape) for out in one.call()]
    assert rows == [(2, LENGTH, width) for width in (4 * WIDTH, 1 + 2 * 16, 2 * WIDTH, WIDTH)]
    assert {leaf.dtype for leaf in one.leaves} == {torch.bfloat16}
    assert len(one.leaves) == 4 + 4 + 2
    assert not mixer.in_proj._forward_hooks


def test_rows() -> None:
    common = {"case", "who", "gpu µs", "wall µs", *peak(SETUP.device)}
    small = NeighbourCase(mixer="attention", config=BY_PEER["sdpa"][0], batch=2, length=LENGTH, d_model=WIDTH)
    floor, ours, theirs = neighbours(small, SETUP)
    assert [row["who"] for row in (floor, ours, theirs)] == ["its products", "ours", "sdpa"]
    assert set(floor) == common
    assert set(ours) == common | {"of its products"}
    assert set(theirs) - {"by"} == set(ours) | {"ours times as fast"}
    assert theirs["ours times as fast"] == pytest.approx(theirs["gpu µs"] / ours["gpu µs"])


def test_a_peer_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbour_peers, "imported", lambda module: None)
    small = NeighbourCase(mixer="rwkv", config=RWKVConfig(), batch=2, length=LENGTH, d_model=WIDTH)
    *_, theirs = neighbours(small, SETUP)
    assert theirs == {"case": "rwkv-2x12x8", "who": "fla", "note": "not installed"}


@pytest.mark.usefixtures("fla")
@pytest.mark.parametrize("config", [case.config for case in NEIGHBOURS], ids=[case.mixer for case in NEIGHBOURS])
def test_every_case_trains_in_mixed_precision(config: MixerConfig) -> None:
    small = NeighbourCase(mixer="", config=config, batch=1, length=LENGTH, d_model=64)
    assert all("note" not in row for row in neighbours(small, SETUP))


def test_every_mixer_is_timed() -> None:
    assert {case.config.kind for case in NEIGHBOURS} == set(MIXERS)
    assert "mamba-s6-8x2048x1024" in {case.name for case in NEIGHBOURS}
