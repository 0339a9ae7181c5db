"""Queries on a grid that look where they choose to in the image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlmzoo.connector import Grid, register
from vlmzoo.connectors._layers import (
    FeedForward,
    GridConnector,
    MultiHeadAttention,
    at_least_one,
    pool,
    to_tokens,
)


class DeformableAttention(nn.Module):
    """Each query reads a map at a few points around its own place, which it chooses and weighs itself.

    Source: Zhu et al., Deformable DETR (2020), section 4.1, with one level.
    """

    def __init__(self, dim: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.num_heads, self.num_points = num_heads, num_points
        self.offsets = nn.Linear(dim, num_heads * num_points * 2)
        self.weights = nn.Linear(dim, num_heads * num_points)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        angles = torch.arange(num_heads) * (2 * math.pi / num_heads)  # each head begins in a direction of its own
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        points = directions[:, None] * torch.arange(1, num_points + 1)[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_(points.flatten())

    def forward(self, queries: Tensor, places: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(crops, queries, dim), from places (queries, 2), as shares of width and height, in features on a grid."""
        heads, points = self.num_heads, self.num_points
        split = "crops queries (heads points xy) -> (crops heads) queries points xy"
        offsets = rearrange(self.offsets(queries), split, heads=heads, points=points)
        size = torch.tensor([grid[1], grid[0]], device=queries.device, dtype=offsets.dtype)
        where = places[:, None] + offsets / size
        weights = rearrange(
            self.weights(queries), "crops queries (heads points) -> (crops heads) queries points", heads=heads
        )
        values = rearrange(
            self.value(features),
            "crops (height width) (heads dim) -> (crops heads) dim height width",
            height=grid[0],
            heads=heads,
        )
        # in float32: places in bfloat16 would be a tenth of a patch apart
        read = F.grid_sample(values.float(), 2 * where.float() - 1, mode="bilinear", align_corners=False)
        read = torch.einsum("bdqp,bqp->bqd", read, weights.float().softmax(-1)).to(queries.dtype)
        return self.out(rearrange(read, "(crops heads) queries dim -> crops queries (heads dim)", heads=heads))


class DecoderLayer(nn.Module):
    """Queries among one another, then into the image, then a feed-forward; a norm behind each."""

    def __init__(self, dim: int, num_heads: int, num_points: int, intermediate_size: int) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(dim, dim, num_heads=num_heads, head_dim=dim // num_heads, bias=True)
        self.self_attention_norm = nn.LayerNorm(dim)
        self.deformable = DeformableAttention(dim, num_heads, num_points)
        self.deformable_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, intermediate_size, "relu", bias=True)
        self.feed_forward_norm = nn.LayerNorm(dim)

    def forward(self, hidden: Tensor, positions: Tensor, places: Tensor, features: Tensor, grid: Grid) -> Tensor:
        placed = hidden + positions
        read = self.self_attention(placed, (self.self_attention.keys(placed), self.self_attention.values(hidden)))
        hidden = self.self_attention_norm(hidden + read)
        hidden = self.deformable_norm(hidden + self.deformable(hidden + positions, places, features, grid))
        return self.feed_forward_norm(hidden + self.feed_forward(hidden))


@register("d_abstractor")
class DAbstractor(GridConnector):
    """`side` x `side` learned queries, positioned by pooled features, in a deformable decoder.

    Source: Cha et al., Honeybee (2023), section 3.3.2 and its code: the pool is the queries' position, and the places
    that they look around are learned from a regular grid on.
    Differs: the learned positions are interpolated to the grid; no dropout.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        *,
        side: int = 12,
        num_layers: int = 6,
        hidden_size: int = 1024,
        num_heads: int = 8,
        num_points: int = 4,
        intermediate_size: int = 1024,
        position_side: int = 24,
    ) -> None:
        super().__init__()
        at_least_one("d_abstractor", side=side, num_layers=num_layers, num_heads=num_heads, num_points=num_points)
        if hidden_size % num_heads:
            raise ValueError(
                f"connector 'd_abstractor': hidden_size {hidden_size} is no multiple of num_heads {num_heads}"
            )
        self.side = side
        self.embed = nn.Linear(vision_dim, hidden_size) if vision_dim != hidden_size else nn.Identity()
        self.positions = nn.Parameter(torch.empty(hidden_size, position_side, position_side).normal_(std=0.02))
        self.queries = nn.Parameter(torch.randn(side**2, hidden_size))
        along = (0.5 + torch.arange(side) * (position_side - 1) / max(1, side - 1)) / position_side
        self.places = nn.Parameter(torch.stack([along.repeat(side), along.repeat_interleave(side)], -1))
        self.layers = nn.ModuleList(
            DecoderLayer(hidden_size, num_heads, num_points, intermediate_size) for _ in range(num_layers)
        )
        self.project = nn.Linear(hidden_size, text_dim)

    def output_grid(self, grid: Grid) -> Grid:
        return self.side, self.side

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        positions = F.interpolate(self.positions[None], grid, mode="bilinear", align_corners=False)
        features = self.embed(patches) + to_tokens(positions).to(patches.dtype)
        pooled, hidden = pool(features, grid, (self.side, self.side)), self.queries.expand(len(patches), -1, -1)
        for layer in self.layers:
            hidden = layer(hidden, pooled, self.places, features, grid)
        return self.project(hidden)
