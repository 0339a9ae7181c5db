"""One MLP for coarse and fine pools of the same image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmzoo.connector import Connector, Grid, ImageLayout, VisualInput, VisualTokens, map_crops, register
from vlmzoo.connectors._layers import FeedForward, at_least_one, pool, pooled


@register("matryoshka")
class Matryoshka(Connector):
    """Means of regions through an MLP, as fine as the token budget allows; training draws how fine.

    Source: Cai et al., Matryoshka Multimodal Models (M3, 2024), section 3: 576, 144, 36, 9 or 1 token an image.
    Differs: a step trains one scale, drawn anew; the source sums the losses of all.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, sides: tuple[int, ...] = (24, 12, 6, 3, 1)) -> None:
        super().__init__()
        if not sides or list(sides) != sorted(set(sides), reverse=True):
            raise ValueError(f"connector 'matryoshka': expected `sides` from fine to coarse, got {list(sides)}")
        at_least_one("matryoshka", sides=min(sides))
        self.sides = tuple(sides)
        self.project = FeedForward(vision_dim, text_dim, "gelu", bias=True, out_dim=text_dim)

    def grids(self, grid: Grid, budget: int | None) -> Sequence[Grid]:
        """The output grids of a crop that a budget allows, the finest first; the coarsest is always there."""
        every = [pooled(grid, side) for side in self.sides]
        return [(h, w) for h, w in every if budget is None or h * w <= budget] or every[-1:]

    def num_tokens(self, image: ImageLayout) -> int:
        budget = None if image.token_budget is None else image.token_budget // image.num_crops
        finest = [self.grids(grid, budget)[0] for grid in image.grids]
        return sum(height * width for height, width in finest)

    def forward(self, visual: VisualInput) -> VisualTokens:
        place = float(torch.rand(())) if self.training else 0.0

        def tokens_of(patches: Tensor, grid: Grid, budget: int | None) -> Tensor:
            grids = self.grids(grid, budget)
            return self.project(pool(patches, grid, grids[int(place * len(grids))]))

        return map_crops(visual, visual.maps[0].values, tokens_of)
