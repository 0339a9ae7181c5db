"""Queries that read the image once, then an MLP; more of them for more patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmzoo.connector import Grid, TokenConnector, VisionSpec, register
from vlmzoo.connectors._layers import FeedForward, MultiHeadAttention, at_least_one


@register("aria")
class Aria(TokenConnector):
    """One cross-attention of `num_queries` learned queries, or twice as many where the square around the image has more
    than `many_patches` patches.

    Source: Li et al., Aria (2024), section 2.2 and its code: 128 tokens for 1225 patches, 256 for 4900.
    """

    def __init__(self, vision: VisionSpec, text_dim: int, *, num_queries: int = 128, many_patches: int = 1225) -> None:
        super().__init__()
        at_least_one("aria", num_queries=num_queries)
        self.num_queries, self.many_patches = num_queries, many_patches
        dim = vision.hidden_size
        self.queries = nn.Parameter(torch.empty(2 * num_queries, dim).normal_(std=0.02))
        self.query_norm, self.memory_norm, self.norm = (nn.LayerNorm(dim) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.attention = MultiHeadAttention(
            dim, dim, num_heads=vision.num_heads, head_dim=dim // vision.num_heads, bias=True
        )
        self.out = nn.Linear(dim, dim)
        self.project = FeedForward(dim, text_dim, "gelu_tanh", out_dim=text_dim)

    def num_tokens(self, grid: Grid) -> int:
        return self.num_queries * (2 if max(grid) ** 2 > self.many_patches else 1)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        queries = self.query(self.query_norm(self.queries[: self.num_tokens(grid)])).expand(len(patches), -1, -1)
        memory = self.memory_norm(patches)
        keys, values = self.attention.keys(self.key(memory)), self.attention.values(self.value(memory))
        return self.project(self.norm(self.out(self.attention(queries, (keys, values)))))
