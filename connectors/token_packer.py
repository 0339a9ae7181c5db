"""Coarse queries that read their own region in fine features of several layers."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlmzoo.connector import FeatureRequest, Grid, register
from vlmzoo.connectors._layers import (
    FeedForward,
    GridConnector,
    MultiHeadAttention,
    at_least_one,
    merged,
    to_map,
    to_tokens,
)

NORM_EPS = 1e-6


@register("token_packer")
class TokenPacker(GridConnector):
    """A token for each block of `factor` x `factor` patches: a downsampled query attends to that block alone.

    The query is the last of `layers`, bilinearly downsampled; keys and values are read from all of them side by side.

    Source: Li et al., TokenPacker (2024), section 3.2 and its code; factors 2, 3 and 4 give 144, 64 and 36 tokens.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        *,
        factor: int = 2,
        layers: tuple[int, ...] = (12, 16, 22, 23),
        hidden_size: int = 1024,
        num_heads: int = 8,
    ) -> None:
        super().__init__()
        at_least_one("token_packer", factor=factor, hidden_size=hidden_size, num_heads=num_heads)
        if not layers:
            raise ValueError("connector 'token_packer': expected at least one of the encoder's layers in `layers`")
        if hidden_size % num_heads:
            raise ValueError(
                f"connector 'token_packer': hidden_size {hidden_size} is no multiple of num_heads {num_heads}"
            )
        self.factor = factor
        self.requires = FeatureRequest(layers=tuple(layers))
        fine_dim = len(layers) * vision_dim
        self.query = nn.Linear(vision_dim, hidden_size, bias=False)
        self.key = FeedForward(fine_dim, hidden_size, "gelu", bias=True, out_dim=hidden_size)
        self.value = FeedForward(fine_dim, hidden_size, "gelu", bias=True, out_dim=hidden_size)
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(hidden_size, eps=NORM_EPS) for _ in range(3))
        self.attention = MultiHeadAttention(
            hidden_size, hidden_size, num_heads=num_heads, head_dim=hidden_size // num_heads, bias=True
        )
        self.project = FeedForward(hidden_size, text_dim, "gelu", bias=True, out_dim=text_dim)
        self.vision_dim = vision_dim

    def output_grid(self, grid: Grid) -> Grid:
        return merged("token_packer", grid, self.factor)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        height, width = self.output_grid(grid)
        coarse = to_map(patches[..., -self.vision_dim :], grid)
        # bilinear of float16 and bfloat16 is not there everywhere
        coarse = F.interpolate(coarse.float(), (height, width), mode="bilinear", align_corners=False)
        queries = self.query_norm(self.query(to_tokens(coarse).to(patches.dtype)))

        def blocks(x: Tensor, factor: int) -> Tensor:
            form = "crops (height rows width columns) dim -> (crops height width) (rows columns) dim"
            return rearrange(x, form, height=height, width=width, rows=factor, columns=factor)

        keys = self.attention.keys(blocks(self.key_norm(self.key(patches)), self.factor))
        values = self.attention.values(blocks(self.value_norm(self.value(patches)), self.factor))
        read = self.attention(blocks(queries, 1), (keys, values))
        return self.project(rearrange(read, "(crops tokens) 1 dim -> crops tokens dim", tokens=height * width))
