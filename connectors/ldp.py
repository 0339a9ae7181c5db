"""An MLP, then two light convolutional blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vlmzoo.connector import Grid, register
from vlmzoo.connectors._layers import FeedForward, GridConnector, LayerNorm2d, SqueezeExcite, to_map, to_tokens

NORM_EPS = 1e-6  # timm's


def divisible_by_8(channels: float) -> int:
    """MobileNet's rounding, which never takes more than a tenth away."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
    """A MobileNetV3 block of maps that does not expand: depthwise 3x3, squeeze and excite, 1x1."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=False)
        self.depthwise_norm = LayerNorm2d(dim, eps=NORM_EPS)
        self.excite = SqueezeExcite(dim, divisible_by_8(dim // 4), F.relu, F.hardsigmoid)
        self.pointwise = nn.Conv2d(dim, dim, 1, bias=False)
        self.pointwise_norm = LayerNorm2d(dim, eps=NORM_EPS)
        self.residual = stride == 1

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.excite(F.hardswish(self.depthwise_norm(self.depthwise(features))))
        hidden = self.pointwise_norm(self.pointwise(hidden))
        return features + hidden if self.residual else hidden


@register("ldp")
class LDP(GridConnector):
    """A quarter of the tokens: an MLP a patch, a MobileNetV3 block, and another one of stride 2.

    Source: Chu et al., MobileVLM (2023), section 3.3 (the lightweight downsample projector) and its code.
    """

    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        self.project = FeedForward(vision_dim, text_dim, "gelu", bias=True, out_dim=text_dim)
        self.blocks = nn.Sequential(InvertedResidual(text_dim, stride=1), InvertedResidual(text_dim, stride=2))

    def output_grid(self, grid: Grid) -> Grid:
        return -(-grid[0] // 2), -(-grid[1] // 2)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        return to_tokens(self.blocks(to_map(self.project(patches), grid)))
