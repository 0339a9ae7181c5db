"""Neighbouring patches side by side, projected."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from vlmzoo.connector import Grid, register
from vlmzoo.connectors._layers import GridConnector, at_least_one


@register("minigpt_v2")
class MiniGPTv2(GridConnector):
    """A quarter of the tokens: `group` patches that follow one another in a row, concatenated, through a linear layer.

    Source: Chen et al., MiniGPT-v2 (2023), section 2.1.
    Differs: a grid whose rows `group` does not divide is refused; the source would join patches of two rows.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, group: int = 4) -> None:
        super().__init__()
        at_least_one("minigpt_v2", group=group)
        self.group = group
        self.project = nn.Linear(group * vision_dim, text_dim)

    def output_grid(self, grid: Grid) -> Grid:
        if grid[1] % self.group:
            raise ValueError(f"connector 'minigpt_v2': rows of {grid[1]} patches cannot be cut into {self.group}s")
        return grid[0], grid[1] // self.group

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        return self.project(
            rearrange(patches, "crops (tokens group) dim -> crops tokens (group dim)", group=self.group)
        )
