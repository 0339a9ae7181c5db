"""Patch features from a CLIP or SigLIP tower."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmzoo.connector import FeatureMap, FeatureRequest, Grid, VisionSpec
from vlmzoo.registry import unknown

HAS_CLS = {"clip_vision_model": True, "siglip_vision_model": False}
"""transformers' model types that can be an encoder, and whether their first hidden state is a CLS token."""


class VisionEncoder(nn.Module):
    """A vision tower whose hidden states are read as patch features.

    Args:
        model: a transformers vision model of one of the types in `HAS_CLS`.
        layer: index into its hidden states for connectors that ask for none themselves. LLaVA reads -2.
        image_size: pixels a side; another than the tower's own interpolates its position embeddings.

    Raises:
        ValueError: a model type that is not known, a layer the tower lacks, a size its patches do not fill.

    Source: Liu et al., Visual Instruction Tuning (2023), section 4.1; hidden states before the post-LayerNorm.
    """

    chunk_size: int | None = 16
    """Crops encoded at once, the last chunk padded, so that a crop's features depend on no other; None: all at once."""

    def __init__(self, model: PreTrainedModel, *, layer: int = -2, image_size: int | None = None) -> None:
        super().__init__()
        config = model.config
        if config.model_type not in HAS_CLS:
            raise unknown("encoder type", config.model_type, HAS_CLS)
        self.model = model
        self.layer = layer
        self.image_size = image_size or config.image_size
        self.spec = VisionSpec(
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            norm_eps=config.layer_norm_eps,
            patch_size=config.patch_size,
            has_cls=HAS_CLS[config.model_type],
        )
        self._check_layer(layer)
        self.grid(self.image_size, self.image_size)

    def grid(self, height: int, width: int) -> Grid:
        """(height, width) in patches of an image of that many pixels."""
        patch = self.spec.patch_size
        if height < patch or width < patch:
            raise ValueError(f"image of {height} x {width} pixels: the encoder's patches are {patch} pixels a side")
        return height // patch, width // patch

    def _check_layer(self, layer: int) -> None:
        states = self.spec.num_layers + 1
        if not -states <= layer < states:
            raise ValueError(f"encoder layer {layer}: the tower has hidden states {-states} to {states - 1}")

    def encode(self, pixel_values: Tensor, request: FeatureRequest) -> tuple[FeatureMap, ...]:
        """One feature map a requested layer, from pixel values (crops, 3, height, width)."""
        layers = request.layers or (self.layer,)
        for layer in layers:
            self._check_layer(layer)
        if request.cls and not self.spec.has_cls:
            raise ValueError(f"a CLS feature was asked of a {self.model.config.model_type}, which has none")
        grid = self.grid(*pixel_values.shape[-2:])
        chunk = self.chunk_size or len(pixel_values)
        trained = any(parameter.requires_grad for parameter in self.model.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            parts = [self._encode_chunk(part, chunk, layers, request) for part in pixel_values.split(chunk)]
        maps = []
        for index in range(len(layers)):
            states = torch.cat([part[index][0] for part in parts])
            cls = torch.cat([part[index][1] for part in parts]) if request.cls else None
            attention = torch.cat([part[index][2] for part in parts]) if request.cls_attention else None
            maps.append(FeatureMap.dense(states, grid, cls, attention))
        return tuple(maps)

    def _encode_chunk(self, pixels: Tensor, chunk: int, layers: tuple[int, ...], request: FeatureRequest) -> list:
        count = len(pixels)
        pixels = torch.cat([pixels, pixels.new_zeros(chunk - count, *pixels.shape[1:])]).to(self.model.dtype)
        resized = pixels.shape[-2:] != (self.model.config.image_size,) * 2
        output = self.model(
            pixel_values=pixels,
            output_hidden_states=True,
            output_attentions=request.cls_attention,
            interpolate_pos_encoding=resized,
        )
        first = int(self.spec.has_cls)
        found = []
        for layer in layers:
            state = output.hidden_states[layer][:count]
            cls = state[:, 0] if request.cls else None
            attention = None
            if request.cls_attention:
                block = (layer if layer >= 0 else layer + self.spec.num_layers + 1) - 1
                attention = output.attentions[block][:count, :, 0, 1:]
            found.append((state[:, first:], cls, attention))
        return found
