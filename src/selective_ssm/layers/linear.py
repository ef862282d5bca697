"""A linear layer that reads its weight at memory's speed where few tokens come: `ops.linear` as a module."""

from __future__ import annotations

from torch import Tensor, nn

from selective_ssm.ops import linear


class Linear(nn.Linear):
    """`torch.nn.Linear` in all but the time that few tokens take.

    Example:
        >>> layer = Linear(3, 2)
        >>> isinstance(layer, nn.Linear), list(layer.state_dict())
        (True, ['weight', 'bias'])
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
