"""A fingerprint tells weights apart by every bit, and by nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from selective_ssm.models.fingerprint import fingerprint, of_others, stamp


def of(tensor: Tensor) -> str:
    return fingerprint({"weight": tensor})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (7, 3, 5), (33, 1024), (0, 4)])
def test_every_bit_counts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    content = tensor.clone().flatten().view(torch.uint8)
    found = {of(tensor)}
    places = torch.randint(content.numel(), (20,)).unique().tolist() if content.numel() else []
    for place in places:
        for bit in range(8):
            content[place] ^= 1 << bit
            found.add(of(content.view(dtype).view(shape)))
            content[place] ^= 1 << bit
    assert len(found) == 1 + 8 * len(places)
    assert of(content.view(dtype).view(shape)) == of(tensor)


def test_places_count() -> None:
    tensor = torch.randn(64, 2048)
    swapped, rows, blocks = tensor.clone(), tensor[[1, 0, *range(2, 64)]], tensor.roll(2048 // 2, dims=1)
    swapped[3, [4, 700]] = tensor[3, [700, 4]]
    others = [swapped, rows, blocks, tensor.roll(1, dims=1), tensor[:32].T.reshape(32, 2048)]
    assert len({of(tensor), *map(of, others)}) == 1 + len(others)


def test_names_dtypes_and_shapes_count() -> None:
    tensor = torch.zeros(4, 6)
    others = [tensor.bfloat16(), tensor.double(), tensor.view(6, 4), tensor.flatten(), torch.zeros(4, 7)]
    assert len({of(tensor), fingerprint({"other": tensor}), fingerprint({}), *map(of, others)}) == 3 + len(others)


def test_order_and_memory_do_not_count() -> None:
    one, other = torch.randn(16, 512), torch.randn(3)
    assert fingerprint({"a": one, "b": other}) == fingerprint({"b": other, "a": one})
    assert of(one.T.contiguous().T) == of(one)
    assert of(torch.cat([torch.zeros(1), one.flatten()])[1:].view(16, 512)) == of(one), "at an odd place in memory"


def test_a_stamp_tells_of_writes_and_of_other_tensors() -> None:
    layer = nn.Linear(2, 2)
    stamps = [stamp(layer)]
    with torch.no_grad():
        layer.bias.zero_()
    stamps.append(stamp(layer))
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    stamps.append(stamp(layer))
    assert stamps[2] == stamp(layer)
    assert len({tuple(one) for one in stamps}) == 3


def test_tensors_of_inference_mode_can_be_stamped() -> None:
    with torch.inference_mode():
        layer = nn.Linear(2, 2)
    assert len(stamp(layer)) == 2


class Adapter(nn.Module):
    """Of another library, in a linear layer's place, with settings beside its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.active, self.strength = nn.Linear(2, 2), ["default"], {"default": 2.0}


def test_a_stamp_tells_of_the_settings_of_others_modules() -> None:
    model = nn.Sequential(Adapter())
    stamps = [stamp(model)]
    model[0].strength["default"] = 1.0
    stamps.append(stamp(model))
    model[0].active.clear()
    stamps.append(stamp(model))
    assert stamps[2] == stamp(model)
    assert len({repr(one) for one in stamps}) == 3
    assert of_others(model.modules()) == [model[0]]
