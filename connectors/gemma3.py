"""Means of blocks, normed and projected."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vlmzoo.connector import Grid, VisionSpec, register
from vlmzoo.connectors._layers import GridConnector, at_least_one, merged, pool


class CentredRMSNorm(nn.RMSNorm):
    """An RMS norm whose weight is stored less one."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


@register("gemma3")
class Gemma3(GridConnector):
    """A sixteenth of the tokens: means of `factor` x `factor` patches, an RMS norm, one matrix.

    Source: Gemma Team, Gemma 3 Technical Report (2025), section 2.2: 4096 patches to 256 tokens.
    """

    def __init__(self, vision_dim: int, text_dim: int, vision: VisionSpec, *, factor: int = 4) -> None:
        super().__init__()
        at_least_one("gemma3", factor=factor)
        self.factor = factor
        self.norm = CentredRMSNorm(vision_dim, eps=vision.norm_eps)
        self.project = nn.Linear(vision_dim, text_dim, bias=False)

    def output_grid(self, grid: Grid) -> Grid:
        return merged("gemma3", grid, self.factor)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        return self.project(self.norm(pool(patches, grid, self.output_grid(grid))))
