"""An MLP a patch."""

from __future__ import annotations

from torch import Tensor, nn

from vlmzoo.connector import FeatureRequest, Grid, register
from vlmzoo.connectors._layers import GridConnector, at_least_one


@register("mlp")
class MLPConnector(GridConnector):
    """As many tokens as patches, each through `depth` linear layers with an exact GELU between them.

    With `layers` it reads these of the encoder's side by side, else the one that the run names.

    Source: Liu et al., Improved Baselines with Visual Instruction Tuning (LLaVA-1.5, 2023), section 3.3: `mlp2x_gelu`.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, depth: int = 2, layers: tuple[int, ...] = ()) -> None:
        super().__init__()
        at_least_one("mlp", depth=depth)
        self.requires = FeatureRequest(layers=tuple(layers))
        modules: list[nn.Module] = [nn.Linear(vision_dim * max(1, len(layers)), text_dim)]
        for _ in range(depth - 1):
            modules += [nn.GELU(), nn.Linear(text_dim, text_dim)]
        self.layers = nn.Sequential(*modules)

    def output_grid(self, grid: Grid) -> Grid:
        return grid

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        return self.layers(patches)
