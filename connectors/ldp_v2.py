"""An MLP, a pool and positions by a convolution."""

from __future__ import annotations

from torch import Tensor, nn

from vlmzoo.connector import Grid, register
from vlmzoo.connectors._layers import FeedForward, GridConnector, at_least_one, pool, pooled, to_map, to_tokens


@register("ldp_v2")
class LDPv2(GridConnector):
    """`side` x `side` tokens: an MLP a patch, means of regions, and a depthwise 3x3 convolution added to them.

    Source: Chu et al., MobileVLM V2 (2024), section 3.3.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, side: int = 12) -> None:
        super().__init__()
        at_least_one("ldp_v2", side=side)
        self.side = side
        self.project = FeedForward(vision_dim, text_dim, "gelu", bias=True, out_dim=text_dim)
        self.positions = nn.Conv2d(text_dim, text_dim, 3, padding=1, groups=text_dim)

    def output_grid(self, grid: Grid) -> Grid:
        return pooled(grid, self.side)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        output = self.output_grid(grid)
        tokens = pool(self.project(patches), grid, output)
        return tokens + to_tokens(self.positions(to_map(tokens, output)))
