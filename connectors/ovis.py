"""Patches as mixtures of words of a visual vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vlmzoo.connector import Grid, register
from vlmzoo.connectors._layers import GridConnector, at_least_one, merge_patches, to_map, to_tokens


@register("ovis")
class Ovis(GridConnector):
    """Blocks of `factor` x `factor` patches, each a probability over a visual vocabulary times its embeddings.

    Source: Lu et al., Ovis (2024), section 3.1: softmax(norm(W x)) E; Ovis2 takes 65,536 words and blocks of 2 x 2.
    Blocks that the grid does not fill are filled with zeros.
    Differs: no embeddings of its own for the beginning and the end of an image.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, vocab_size: int = 131_072, factor: int = 1) -> None:
        super().__init__()
        at_least_one("ovis", vocab_size=vocab_size, factor=factor)
        self.factor = factor
        self.head = nn.Linear(factor**2 * vision_dim, vocab_size, bias=False)
        self.norm = nn.LayerNorm(vocab_size)
        self.table = nn.Embedding(vocab_size, text_dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def output_grid(self, grid: Grid) -> Grid:
        return -(-grid[0] // self.factor), -(-grid[1] // self.factor)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        height, width = (self.factor * length for length in self.output_grid(grid))
        if (height, width) != grid:
            padding = (0, width - grid[1], 0, height - grid[0])
            patches = to_tokens(F.pad(to_map(patches, grid), padding))
        words = self.norm(self.head(merge_patches(patches, (height, width), self.factor))).softmax(-1)
        return words.to(patches.dtype) @ self.table.weight
