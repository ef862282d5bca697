"""Which weights these are, in a few bytes, and whether they are still what they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

_WORD = 8  # bytes
_ROW = 512  # words


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Tell weights apart: BLAKE2b of each one's name, dtype, shape and two families of sums over its bits.

    A tensor's memory is read as rows of 512 words w of 64 bits, filled up with zeros. With whole numbers modulo 2⁶⁴,

        rows[i] = Σⱼ w[i, j],  columns[j] = Σᵢ w[i, j]

    are the same on every device and in any order of adding, take no more than reading the weights, and change with
    each single bit, and when values change places. So an accident is as unlikely as with a hash; but a fingerprint can
    be forged.

    Args:
        weights: tensors of any shape and dtype by name, such as a state dict; the same numbers in another dtype are
            other weights.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> one, other = torch.zeros(2, 3), torch.zeros(2, 3)
        >>> fingerprint({"weight": one}) == fingerprint({"weight": other})
        True
        >>> other[1, 2] = 1e-30
        >>> fingerprint({"weight": one}) == fingerprint({"weight": other})
        False
    """
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        words = _words(tensor.detach())
        sums = torch.cat([words.sum(dim=0), words.sum(dim=1)])
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def stamp(model: nn.Module) -> list[object]:
    """Where a model's parameters and buffers lie, and how often each was written to: another list after a change.

    It is for one process and read in no time. Writes through ``.data``, and to tensors of inference mode, leave no
    trace. Of modules by others it holds the settings too: an adapter may be switched off, or act more strongly.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = stamp(layer)
        >>> _ = layer.weight.detach().mul_(2)
        >>> stamp(layer) == before
        False
    """
    weights = (*model.parameters(), *model.buffers())
    written = [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in weights]
    settings = [repr(one) for module in of_others(model.modules()) for one in vars(module).values() if _is_plain(one)]
    return [*written, *settings]


def of_others(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that are neither torch's nor this library's: what they do may depend on more than tensors.

    Example:
        >>> of_others([nn.Linear(2, 2)])
        []
    """
    return [one for one in modules if type(one).__module__.partition(".")[0] not in ("torch", "selective_ssm")]


def _is_plain(value: object) -> bool:
    """Whether it is made of numbers, texts and containers of such."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _words(tensor: Tensor) -> Tensor:
    """A tensor's memory as rows of words, (n, 512) int64; a copy only where it does not fill or begin them evenly."""
    content = tensor.contiguous().flatten().view(torch.uint8)
    if content.numel() % (_WORD * _ROW) or content.storage_offset() % _WORD:
        content = pad(content, (0, -content.numel() % (_WORD * _ROW)))
    return content.view(torch.int64).view(-1, _ROW)
