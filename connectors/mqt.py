"""Queries of which the first few are enough."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmzoo.connector import Connector, Grid, ImageLayout, VisualInput, VisualTokens, map_crops, register
from vlmzoo.connectors._layers import at_least_one
from vlmzoo.connectors.qwen_vl import NORM_EPS, Resampler


@register("mqt")
class MatryoshkaQueries(Connector):
    """The first m of `side` x `side` learned queries that read the image once; training draws m, a budget sets it.

    Source: Hu et al., Matryoshka Query Transformer (2024), section 3: m even, from 2 to 256.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, side: int = 16, num_heads: int = 8) -> None:
        super().__init__()
        at_least_one("mqt", side=side, num_heads=num_heads)
        if vision_dim % num_heads or vision_dim % 4:
            raise ValueError(f"connector 'mqt': width {vision_dim} of the encoder is no multiple of 4 and {num_heads}")
        self.resampler = Resampler(vision_dim, vision_dim, side=side, num_heads=num_heads)
        self.norm = nn.LayerNorm(vision_dim, eps=NORM_EPS)
        self.project = nn.Linear(vision_dim, text_dim, bias=False)

    def num_queries(self, budget: int | None) -> int:
        """How many queries read a crop."""
        every = len(self.resampler.queries)
        return every if budget is None else max(1, min(budget, every))

    def num_tokens(self, image: ImageLayout) -> int:
        budget = None if image.token_budget is None else image.token_budget // image.num_crops
        return image.num_crops * self.num_queries(budget)

    def forward(self, visual: VisualInput) -> VisualTokens:
        place = float(torch.rand(())) if self.training else 1.0

        def tokens_of(patches: Tensor, grid: Grid, budget: int | None) -> Tensor:
            most = self.num_queries(budget)
            count = min(most, 2 + 2 * int(place * (most // 2))) if self.training else most
            return self.project(self.norm(self.resampler(patches, grid, count)))

        return map_crops(visual, visual.maps[0].values, tokens_of)
