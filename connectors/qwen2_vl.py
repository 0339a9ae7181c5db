"""Neighbouring patches normed, joined, and through an MLP of their joint width."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from vlmzoo.connector import Grid, register
from vlmzoo.connectors._layers import FeedForward, GridConnector, at_least_one, merge_patches, merged
from vlmzoo.registry import unknown

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
NORM_EPS = 1e-6


class Merger(nn.Module):
    """(crops, tokens, text_dim): each patch normed, or each block, and two layers on the joint width of a block."""

    def __init__(
        self, vision_dim: int, text_dim: int, factor: int, norm: type[nn.Module], *, norm_blocks: bool = False
    ) -> None:
        super().__init__()
        self.factor, self.norm_blocks = factor, norm_blocks
        dim = factor**2 * vision_dim
        self.norm = norm(dim if norm_blocks else vision_dim, eps=NORM_EPS)
        self.project = FeedForward(dim, dim, "gelu", bias=True, out_dim=text_dim)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        if self.norm_blocks:
            return self.project(self.norm(merge_patches(patches, grid, self.factor)))
        return self.project(merge_patches(self.norm(patches), grid, self.factor))


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
        self.merger = Merger(vision_dim, text_dim, factor, NORMS[norm])

    def output_grid(self, grid: Grid) -> Grid:
        return merged("qwen2_vl", grid, self.merger.factor)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        return self.merger(patches, grid)
