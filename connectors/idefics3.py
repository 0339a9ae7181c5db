"""Pixel shuffle and one linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from vlmzoo.connector import Grid, register
from vlmzoo.connectors._layers import GridConnector, at_least_one, merge_patches, merged


@register("idefics3")
class Idefics3(GridConnector):
    """Blocks of `factor` x `factor` patches as channels of one token, through a linear layer without a bias.

    Source: Laurençon et al., Building and better understanding vision-language models (Idefics3, 2024), section 3.1;
    Marafioti et al., SmolVLM (2025), whose smaller models take 3 or 4.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, factor: int = 2) -> None:
        super().__init__()
        at_least_one("idefics3", factor=factor)
        self.factor = factor
        self.project = nn.Linear(factor**2 * vision_dim, text_dim, bias=False)

    def output_grid(self, grid: Grid) -> Grid:
        return merged("idefics3", grid, self.factor)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        return self.project(merge_patches(patches, grid, self.factor))
