"""Means of regions, through an MLP."""

from __future__ import annotations

from torch import Tensor

from vlmzoo.connector import Grid, register
from vlmzoo.connectors._layers import FeedForward, GridConnector, at_least_one, pool, pooled


@register("average_pool")
class AveragePool(GridConnector):
    """`side` x `side` tokens: means of the patches in each region, through two linear layers.

    Source: Yao et al., DeCo (2024), section 4.1.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, side: int = 12) -> None:
        super().__init__()
        at_least_one("average_pool", side=side)
        self.side = side
        self.project = FeedForward(vision_dim, text_dim, "gelu", bias=True, out_dim=text_dim)

    def output_grid(self, grid: Grid) -> Grid:
        return pooled(grid, self.side)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        return self.project(pool(patches, grid, self.output_grid(grid)))
