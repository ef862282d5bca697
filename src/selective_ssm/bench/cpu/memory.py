"""What passes allocate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Allocated(TorchDispatchMode):
    """Counts the bytes of every tensor that torch makes inside of it, also of those that are gone again.

    It sees the operations in a backend's functions, but not those inside a registered operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bytes: dict[int, int] = {}
        self._kept: list[Tensor] = []  # so that no address comes up twice

    def beyond(self, own: Iterable[Tensor]) -> int:
        """The bytes of all but some."""
        addresses = {x.untyped_storage().data_ptr() for x in own}
        return sum(size for address, size in self._bytes.items() if address not in addresses)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self._bytes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                self._kept.append(x)
        return result
