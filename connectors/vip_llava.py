"""An MLP that reads several layers of the encoder."""

from __future__ import annotations

from torch import Tensor, nn

from vlmzoo.connector import FeatureRequest, Grid, register
from vlmzoo.connectors._layers import FeedForward, GridConnector


@register("vip_llava")
class VipLlava(GridConnector):
    """As many tokens as patches: five layers of the encoder side by side, normed, through two linear layers.

    Source: Cai et al., ViP-LLaVA (2023), section 3.1: four late layers of CLIP-L and an early one.
    """

    def __init__(
        self, vision_dim: int, text_dim: int, *, layers: tuple[int, ...] = (-2, -5, -8, -11, 6), norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("connector 'vip_llava': expected at least one of the encoder's layers in `layers`")
        self.requires = FeatureRequest(layers=tuple(layers))
        self.norm = nn.LayerNorm(len(layers) * vision_dim, eps=norm_eps)
        self.project = FeedForward(len(layers) * vision_dim, text_dim, "gelu", bias=True, out_dim=text_dim)

    def output_grid(self, grid: Grid) -> Grid:
        return grid

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        return self.project(self.norm(patches))
