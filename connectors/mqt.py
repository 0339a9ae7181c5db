"""Queries of which the first few are enough."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmzoo.connector import Connector, Grid, ImageLayout, VisualInput, VisualTokens, map_crops, register
from vlmzoo.connectors._layers import MultiHeadAttention, at_least_one, to_map, to_tokens
from vlmzoo.connectors.qwen_vl import NORM_EPS, sincos


@register("mqt")
class MatryoshkaQueries(Connector):
    """The first m of `side` x `side` learned queries that read the image once; training draws m, a budget sets it.

    Queries find their patches by position alone, as in its code: keys are normed positions, values normed features.

    Source: Hu et al., Matryoshka Query Transformer (2024), section 3: m even, from 2 to 256.
    Differs: m is drawn in both stages, where the source trains the first one with all queries.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, side: int = 16, num_heads: int = 16) -> None:
        super().__init__()
        at_least_one("mqt", side=side, num_heads=num_heads)
        if vision_dim % num_heads or vision_dim % 4:
            raise ValueError(f"connector 'mqt': width {vision_dim} of the encoder is no multiple of 4 and {num_heads}")
        self.side = side
        self.queries = nn.Parameter(torch.empty(side**2, vision_dim).normal_(std=0.02))
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(vision_dim, eps=NORM_EPS) for _ in range(3))
        self.attention = MultiHeadAttention(
            vision_dim, vision_dim, num_heads=num_heads, head_dim=vision_dim // num_heads, bias=True
        )
        self.project = nn.Linear(vision_dim, text_dim, bias=False)

    def num_queries(self, budget: int | None) -> int:
        """How many queries read a crop."""
        return self.side**2 if budget is None else max(1, min(budget, self.side**2))

    def num_tokens(self, image: ImageLayout) -> int:
        budget = None if image.token_budget is None else image.token_budget // image.num_crops
        return image.num_crops * self.num_queries(budget)

    def forward(self, visual: VisualInput) -> VisualTokens:
        place = float(torch.rand(())) if self.training else 1.0

        def tokens_of(patches: Tensor, grid: Grid, budget: int | None) -> Tensor:
            count = self.num_queries(budget)
            if self.training:
                count = min(count, 2 + 2 * int(place * (count // 2)))
            return self._read(patches, grid, count)

        return map_crops(visual, visual.maps[0].values, tokens_of)

    def _read(self, patches: Tensor, grid: Grid, count: int) -> Tensor:
        own = (self.side, self.side)
        positions = sincos(patches.shape[-1], own, patches.device)
        there = to_tokens(F.interpolate(to_map(positions, own), grid, mode="bicubic", align_corners=False))
        queries = self.query_norm(self.queries[:count] + positions[:, :count].to(patches.dtype))
        keys = self.attention.keys(self.key_norm(there.to(patches.dtype)))
        values = self.attention.values(self.value_norm(patches))
        many = len(patches)
        read = self.attention(queries.expand(many, -1, -1), (keys.expand(many, -1, -1, -1), values))
        return self.project(read)
