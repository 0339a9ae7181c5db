"""An MLP a patch."""

from __future__ import annotations

from torch import Tensor, nn

from vlmzoo.connector import Grid, register
from vlmzoo.connectors._layers import GridConnector, at_least_one


@register("mlp")
class MLPConnector(GridConnector):
    """As many tokens as patches, each through `depth` linear layers with an exact GELU between them.

    Source: Liu et al., Improved Baselines with Visual Instruction Tuning (LLaVA-1.5, 2023), section 3.3: `mlp2x_gelu`.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, depth: int = 2) -> None:
        super().__init__()
        at_least_one("mlp", depth=depth)
        layers: list[nn.Module] = [nn.Linear(vision_dim, text_dim)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(text_dim, text_dim)]
        self.layers = nn.Sequential(*layers)

    def output_grid(self, grid: Grid) -> Grid:
        return grid

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        return self.layers(patches)
