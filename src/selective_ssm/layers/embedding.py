"""An embedding whose gradient takes less time where the vocabulary is small: `ops.embedding` as a module."""

from __future__ import annotations

from torch import Tensor, nn

from selective_ssm.ops.embedding import embedding


class Embedding(nn.Embedding):
    """`torch.nn.Embedding`, without its options, in all but the time that the gradient of few rows takes.

    Example:
        >>> table = Embedding(3, 2)
        >>> isinstance(table, nn.Embedding), list(table.state_dict())
        (True, ['weight'])
    """

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, self.weight)
