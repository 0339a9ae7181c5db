"""Learned queries that read the image once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmzoo.connector import Grid, TokenConnector, register
from vlmzoo.connectors._layers import MANY, MultiHeadAttention, at_least_one
from vlmzoo.kernels.resampler import normalize


@register("attention_pooling")
class AttentionPooling(TokenConnector):
    """`num_queries` tokens: one attention of learned queries over the patches, and a projection.

    Source: Yu et al., CoCa (2022), section 3.2 (the attentional pooler); compared as a connector in McKinzie et al.,
    MM1 (2024), section 3.2.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, num_queries: int = 144, num_heads: int = 8) -> None:
        super().__init__()
        at_least_one("attention_pooling", num_queries=num_queries, num_heads=num_heads)
        if vision_dim % num_heads:
            raise ValueError(
                f"connector 'attention_pooling': the encoder's width {vision_dim} is no multiple of {num_heads} heads"
            )
        self.queries = nn.Parameter(torch.randn(num_queries, vision_dim))
        self.query_norm, self.memory_norm = nn.LayerNorm(vision_dim), nn.LayerNorm(vision_dim)
        self.attention = MultiHeadAttention(
            vision_dim, vision_dim, num_heads=num_heads, head_dim=vision_dim // num_heads, bias=True
        )
        self.project = nn.Linear(vision_dim, text_dim)

    def num_tokens(self, grid: Grid) -> int:
        return len(self.queries)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        attention, queries = self.attention, self.query_norm(self.queries).expand(len(patches), -1, -1)
        if patches.shape[1] < MANY:
            return self.project(attention(queries, attention.keys_values(self.memory_norm(patches))))
        return self.project(attention.read_normalized(queries, normalize(patches), self.memory_norm))
