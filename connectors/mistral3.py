"""Neighbouring patches merged to one of the same width, then an MLP."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from vlmzoo.connector import Grid, TextSpec, register
from vlmzoo.connectors._layers import FeedForward, GridConnector, at_least_one, merged


@register("mistral3")
class Mistral3(GridConnector):
    """A quarter of the tokens: patches normed, blocks of `factor` x `factor` merged by a linear layer, then an MLP.

    Channels of a block are ordered channel first, as `unfold` leaves them.

    Source: Mistral AI, Mistral Small 3.1 (2025), its published code.
    """

    def __init__(self, vision_dim: int, text_dim: int, text: TextSpec, *, factor: int = 2, bias: bool = False) -> None:
        super().__init__()
        at_least_one("mistral3", factor=factor)
        self.factor = factor
        self.norm = nn.RMSNorm(vision_dim, eps=text.norm_eps)
        self.merge = nn.Linear(factor**2 * vision_dim, vision_dim, bias=False)
        self.project = FeedForward(vision_dim, text_dim, "gelu", bias=bias, out_dim=text_dim)

    def output_grid(self, grid: Grid) -> Grid:
        return merged("mistral3", grid, self.factor)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        blocks = rearrange(
            self.norm(patches),
            "crops (height rows width columns) dim -> crops (height width) (dim rows columns)",
            rows=self.factor,
            columns=self.factor,
            height=grid[0] // self.factor,
        )
        return self.project(self.merge(blocks))
