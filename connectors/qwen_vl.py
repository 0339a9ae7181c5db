"""Queries on a grid of their own, with positions, that read the image once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmzoo.connector import Grid, register
from vlmzoo.connectors._layers import GridConnector, MultiHeadAttention, at_least_one, to_map, to_tokens

NORM_EPS = 1e-6


def sincos(dim: int, grid: Grid, device: torch.device) -> Tensor:
    """Fixed positions (1, height · width, dim): the first half of the channels tells the column, the second the row.

    Source: `get_2d_sincos_pos_embed` of He et al., Masked Autoencoders (2021).
    """
    rates = 10_000 ** -(torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    rows, columns = (torch.arange(length, device=device, dtype=torch.float32)[:, None] * rates for length in grid)
    rows, columns = (torch.cat([angles.sin(), angles.cos()], -1) for angles in (rows, columns))
    height, width = grid
    both = [columns.expand(height, -1, -1), rows[:, None].expand(-1, width, -1)]
    return torch.cat(both, -1).flatten(0, 1)[None]


class Resampler(nn.Module):
    """(crops, side², dim) that learned queries read from patches (crops, patches, vision_dim)."""

    def __init__(self, vision_dim: int, dim: int, *, side: int, num_heads: int) -> None:
        super().__init__()
        self.side = side
        self.queries = nn.Parameter(torch.empty(side**2, dim).normal_(std=0.02))
        self.project = nn.Linear(vision_dim, dim, bias=False) if vision_dim != dim else nn.Identity()
        self.memory_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.query_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attention = MultiHeadAttention(dim, dim, num_heads=num_heads, head_dim=dim // num_heads, bias=True)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        own = (self.side, self.side)
        positions = sincos(self.queries.shape[-1], own, patches.device)
        there = positions
        if grid != own:  # the source interpolates its table and does not evaluate it between places
            there = to_tokens(F.interpolate(to_map(positions, own), grid, mode="bicubic", align_corners=False))
        memory = self.memory_norm(self.project(patches))
        queries = self.query_norm(self.queries) + positions.to(memory.dtype)
        keys, values = self.attention.keys(memory + there.to(memory.dtype)), self.attention.values(memory)
        return self.attention(queries.expand(len(patches), -1, -1), (keys, values))


@register("qwen_vl")
class QwenVL(GridConnector):
    """`side` x `side` tokens whatever the image: one cross-attention of learned queries, both sides with positions.

    Source: Bai et al., Qwen-VL (2023), section 2.1 and its code (256 queries, heads of 128 channels).
    """

    def __init__(self, vision_dim: int, text_dim: int, *, side: int = 16, head_dim: int = 128) -> None:
        super().__init__()
        at_least_one("qwen_vl", side=side, head_dim=head_dim)
        num_heads = max(1, text_dim // head_dim)
        if text_dim % num_heads or text_dim % 4:
            raise ValueError(
                f"connector 'qwen_vl': the LLM's width {text_dim} is no multiple of 4 and {num_heads} heads"
            )
        self.resampler = Resampler(vision_dim, text_dim, side=side, num_heads=num_heads)
        self.norm = nn.LayerNorm(text_dim, eps=NORM_EPS)
        self.out = nn.Linear(text_dim, text_dim, bias=False)

    def output_grid(self, grid: Grid) -> Grid:
        return self.resampler.side, self.resampler.side

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        return self.out(self.norm(self.resampler(patches, grid)))
