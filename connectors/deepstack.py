"""Features of several depths, added to the visual tokens inside the LLM's first layers."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from vlmzoo.connector import (
    Connector,
    FeatureRequest,
    Grid,
    ImageLayout,
    TextSpec,
    VisionSpec,
    VisualInput,
    VisualTokens,
    map_crops,
    register,
)
from vlmzoo.connectors._layers import at_least_one, merged
from vlmzoo.connectors.qwen2_vl import Merger


@register("deepstack")
class DeepStack(Connector):
    """Merged patches as tokens, and what earlier layers of the encoder saw added to them before LLM layers 1, 2, ...

    Source: Meng et al., DeepStack (2024), section 3; with a merger for each depth, as in Qwen3-VL (2025), section 2.
    """

    def __init__(
        self,
        vision: VisionSpec,
        text: TextSpec,
        *,
        layers: tuple[int, ...] = (6, 12, 18),
        last_layer: int = -2,
        factor: int = 2,
    ) -> None:
        super().__init__()
        at_least_one("deepstack", factor=factor)
        if len(layers) > text.num_layers:
            raise ValueError(
                f"connector 'deepstack': {len(layers)} depths are added inside an LLM of {text.num_layers} layers; "
                "name fewer in `layers`"
            )
        self.requires = FeatureRequest(layers=(last_layer, *layers))
        dims = vision.hidden_size, text.hidden_size
        self.merger = Merger(*dims, factor, nn.LayerNorm)
        self.depths = nn.ModuleList(Merger(*dims, factor, nn.LayerNorm, norm_blocks=True) for _ in layers)

    def num_tokens(self, image: ImageLayout) -> int:
        return sum(height * width for height, width in map(self.output_grid, image.grids))

    def output_grid(self, grid: Grid) -> Grid:
        return merged("deepstack", grid, self.merger.factor)

    def forward(self, visual: VisualInput) -> VisualTokens:
        mergers = self.merger, *self.depths
        found = [
            map_crops(visual, features.values, lambda patches, grid, budget, merger=merger: merger(patches, grid))
            for features, merger in zip(visual.maps, mergers, strict=True)
        ]
        additions = {layer: depth.tokens for layer, depth in enumerate(found[1:], start=1)}
        return replace(found[0], additions=additions)
