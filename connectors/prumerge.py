"""The patches that CLS attends to, each with what resembles it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmzoo.connector import (
    Connector,
    FeatureRequest,
    Grid,
    ImageLayout,
    VisionSpec,
    VisualInput,
    VisualTokens,
    map_crops,
    register,
)
from vlmzoo.connectors._layers import FeedForward, at_least_one

WHISKER = 1.5  # interquartile ranges above the third quartile, where outliers begin


@register("prumerge")
class PruMerge(Connector):
    """As many tokens as patches stand out in CLS's attention, each with its neighbours merged in, and one of the rest.

    Source: Shang et al., LLaVA-PruMerge (2024), section 3, and its code.
    Differs: neighbours are found by the features, not by the keys of the encoder's last layer; attention is the mean
    of the heads of the features' own layer, where the code multiplies all of that layer's queries and keys at once.
    """

    def __init__(self, vision: VisionSpec, text_dim: int, *, num_neighbours: int = 32) -> None:
        super().__init__()
        at_least_one("prumerge", num_neighbours=num_neighbours)
        if not vision.has_cls:
            raise ValueError("connector 'prumerge': needs an encoder with a CLS token, such as CLIP")
        self.num_neighbours = num_neighbours
        self.requires = FeatureRequest(cls_attention=True)
        self.project = FeedForward(vision.hidden_size, text_dim, "gelu", bias=True, out_dim=text_dim)

    def num_tokens(self, image: ImageLayout) -> int:
        return sum(_most(height * width) for height, width in image.grids)

    def forward(self, visual: VisualInput) -> VisualTokens:
        (features,) = visual.maps
        assert features.cls_attention is not None
        attention = features.cls_attention.mean(1)[..., None].to(features.values.dtype)
        # Which tokens are real travels as a channel, through crops of several grids.
        found = map_crops(visual, torch.cat([features.values, attention], -1), self._merge)
        tokens, real = found.tokens[..., :-1], found.mask & (found.tokens[..., -1] > 0)
        order = real.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        tokens = tokens.gather(1, order[..., None].expand_as(tokens))
        return VisualTokens(self.project(tokens), real.gather(1, order))

    def _merge(self, patches: Tensor, grid: Grid, budget: int | None) -> Tensor:
        patches, attention = patches[..., :-1], patches[..., -1].float()
        first, third = attention.quantile(torch.tensor([0.25, 0.75], device=attention.device), dim=1)
        count = (attention > (third + WHISKER * (third - first))[:, None]).sum(1, keepdim=True).clamp(min=1)
        order = attention.argsort(dim=1, descending=True)
        rank = order.argsort(dim=1)
        unit = F.normalize(patches.float(), dim=-1)
        others = torch.eye(patches.shape[1], dtype=torch.bool, device=patches.device)
        alike = (unit @ unit.mT).masked_fill(others, -torch.inf)
        nearest = alike.topk(min(self.num_neighbours, patches.shape[1] - 1), dim=-1).indices
        weights = torch.zeros_like(alike).scatter(-1, nearest, 1) * attention[:, None]
        merged = patches + (weights.to(patches.dtype) @ patches)
        rest = (attention * (rank >= count)).to(patches.dtype)[:, None] @ patches
        places = torch.arange(_most(patches.shape[1]), device=patches.device)
        tokens = merged.gather(1, order[:, : len(places), None].expand(-1, -1, patches.shape[-1]))
        tokens = torch.where((places == count)[..., None], rest, tokens)
        return torch.cat([tokens, (places <= count)[..., None].to(tokens.dtype)], -1)


def _most(num_patches: int) -> int:
    """No more than a quarter of them lies above the third quartile; and one token more."""
    return min(num_patches, num_patches // 4 + 1 + (num_patches < 4))
