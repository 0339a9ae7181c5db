"""Convolutions around a pool."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmzoo.connector import Grid, register
from vlmzoo.connectors._layers import (
    FeedForward,
    GridConnector,
    LayerNorm2d,
    SqueezeExcite,
    at_least_one,
    pooled,
    to_map,
    to_tokens,
)

NORM_EPS = 1e-6  # timm's
SE_RATIO = 0.25


class ResidualBlock(nn.Module):
    """A RegNet block of maps: 1x1, depthwise 3x3, squeeze and excite, 1x1, and the way around them."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.reduce_norm = LayerNorm2d(dim, eps=NORM_EPS)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.depthwise_norm = LayerNorm2d(dim, eps=NORM_EPS)
        self.excite = SqueezeExcite(dim, round(in_dim * SE_RATIO), F.silu, torch.sigmoid)
        self.expand = nn.Conv2d(dim, dim, 1, bias=False)
        self.expand_norm = LayerNorm2d(dim, eps=NORM_EPS)
        self.shortcut = nn.Identity()
        if in_dim != dim:
            self.shortcut = nn.Sequential(nn.Conv2d(in_dim, dim, 1, bias=False), LayerNorm2d(dim, eps=NORM_EPS))

    def forward(self, features: Tensor) -> Tensor:
        hidden = F.silu(self.reduce_norm(self.reduce(features)))
        hidden = self.excite(F.silu(self.depthwise_norm(self.depthwise(hidden))))
        return F.silu(self.expand_norm(self.expand(hidden)) + self.shortcut(features))


@register("c_abstractor")
class CAbstractor(GridConnector):
    """`side` x `side` tokens that keep their neighbourhood: convolutions, an adaptive pool, convolutions, an MLP.

    Source: Cha et al., Honeybee (2023), section 3.3.1; `depth` RegNet blocks on either side, as in its code.
    Differs: the learned positions are interpolated to the grid.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        *,
        side: int = 12,
        depth: int = 3,
        hidden_size: int = 1024,
        position_side: int = 24,
    ) -> None:
        super().__init__()
        at_least_one("c_abstractor", side=side, depth=depth, hidden_size=hidden_size, position_side=position_side)
        self.side = side
        self.positions = nn.Parameter(torch.empty(vision_dim, position_side, position_side).normal_(std=0.02))
        before = [ResidualBlock(vision_dim if block == 0 else hidden_size, hidden_size) for block in range(depth)]
        self.before = nn.Sequential(*before)
        self.after = nn.Sequential(*(ResidualBlock(hidden_size, hidden_size) for _ in range(depth)))
        self.project = FeedForward(hidden_size, text_dim, "silu", bias=True, out_dim=text_dim)

    def output_grid(self, grid: Grid) -> Grid:
        return pooled(grid, self.side)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        positions = F.interpolate(self.positions[None], grid, mode="bilinear", align_corners=False)
        hidden = self.before(to_map(patches, grid) + positions.to(patches.dtype))
        hidden = self.after(F.adaptive_avg_pool2d(hidden, self.output_grid(grid)))
        return self.project(to_tokens(hidden))
