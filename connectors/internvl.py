"""Pixel shuffle and an MLP."""

from __future__ import annotations

from torch import Tensor, nn

from vlmzoo.connector import Grid, register
from vlmzoo.connectors._layers import FeedForward, GridConnector, at_least_one, merge_patches, merged


@register("internvl")
class InternVL(GridConnector):
    """A quarter of the tokens: blocks of `factor` x `factor` patches as channels, normed, through two linear layers.

    Source: Chen et al., How Far Are We to GPT-4V? (InternVL 1.5, 2024), section 3.1.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, factor: int = 2) -> None:
        super().__init__()
        at_least_one("internvl", factor=factor)
        self.factor = factor
        dim = factor**2 * vision_dim
        self.norm = nn.LayerNorm(dim)
        self.project = FeedForward(dim, text_dim, "gelu", bias=True, out_dim=text_dim)

    def output_grid(self, grid: Grid) -> Grid:
        return merged("internvl", grid, self.factor)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        return self.project(self.norm(merge_patches(patches, grid, self.factor)))
