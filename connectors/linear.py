"""One linear layer a patch."""

from __future__ import annotations

from torch import Tensor, nn

from vlmzoo.connector import Grid, register
from vlmzoo.connectors._layers import GridConnector


@register("linear")
class LinearConnector(GridConnector):
    """As many tokens as patches, each W x + b.

    Source: Liu et al., Visual Instruction Tuning (LLaVA, 2023), section 4.1; also Beyer et al., PaliGemma (2024).
    """

    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(vision_dim, text_dim)

    def output_grid(self, grid: Grid) -> Grid:
        return grid

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        return self.project(patches)
