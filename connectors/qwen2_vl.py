"""Neighbouring patches normed, joined, and through an MLP of their joint width."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from vlmzoo.connector import Grid, register
from vlmzoo.connectors._layers import FeedForward, GridConnector, at_least_one, merge_patches, merged
from vlmzoo.registry import unknown

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
NORM_EPS = 1e-6


@register("qwen2_vl")
class Qwen2VL(GridConnector):
    """A quarter of the tokens: each patch normed, blocks of `factor` x `factor` joined, two layers 4D -> 4D -> H.

    Source: Wang et al., Qwen2-VL (2024), section 2.1; Bai et al., Qwen2.5-VL (2025): `norm` "rms".
    """

    def __init__(
        self, vision_dim: int, text_dim: int, *, factor: int = 2, norm: Literal["layer", "rms"] = "layer"
    ) -> None:
        super().__init__()
        at_least_one("qwen2_vl", factor=factor)
        if norm not in NORMS:
            raise unknown("norm of connector 'qwen2_vl'", norm, NORMS)
        self.factor = factor
        dim = factor**2 * vision_dim
        self.norm = NORMS[norm](vision_dim, eps=NORM_EPS)
        self.project = FeedForward(dim, dim, "gelu", bias=True, out_dim=text_dim)

    def output_grid(self, grid: Grid) -> Grid:
        return merged("qwen2_vl", grid, self.factor)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        return self.project(merge_patches(self.norm(patches), grid, self.factor))
