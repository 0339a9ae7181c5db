"""An MLP a patch, then means of blocks."""

from __future__ import annotations

from torch import Tensor

from vlmzoo.connector import Grid, register
from vlmzoo.connectors._layers import FeedForward, GridConnector, at_least_one, merged, pool


@register("perception_lm")
class PerceptionLM(GridConnector):
    """A quarter of the tokens: each patch through two linear layers, then means of `factor` x `factor` of them.

    Source: Cho et al., PerceptionLM (2025), section 3.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, factor: int = 2) -> None:
        super().__init__()
        at_least_one("perception_lm", factor=factor)
        self.factor = factor
        self.project = FeedForward(vision_dim, text_dim, "gelu", bias=True, out_dim=text_dim)

    def output_grid(self, grid: Grid) -> Grid:
        return merged("perception_lm", grid, self.factor)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        return pool(self.project(patches), grid, self.output_grid(grid))
