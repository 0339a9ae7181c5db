"""Patch features from a vision tower of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vlmzoo.connector import FeatureMap, FeatureRequest, Grid, VisionSpec
from vlmzoo.registry import unknown

PREFIX: dict[str, Callable[[PreTrainedConfig], int]] = {
    "clip_vision_model": lambda config: 1,
    "siglip_vision_model": lambda config: 0,
    "siglip2_vision_model": lambda config: 0,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + config.num_register_tokens,
    "internvl_vision": lambda config: 1,
}
"""transformers' model types that can be an encoder: how many hidden states stand before the patches, CLS first."""


def side(config: PreTrainedConfig) -> int:
    """Pixels a side of the images that a tower was made for."""
    if config.model_type == "siglip2_vision_model":
        return math.isqrt(config.num_patches) * config.patch_size
    return _one(config.image_size, "image_size")


def _one(size: int | Sequence[int], what: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"encoder: expected a square {what}, got {list(sides)}")
    return sides.pop()


class VisionEncoder(nn.Module):
    """A vision tower whose hidden states are read as patch features.

    Args:
        model: a transformers vision model of one of the types in `PREFIX`.
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
        if config.model_type not in PREFIX:
            raise unknown("encoder type", config.model_type, PREFIX)
        self.model = model
        self.layer = layer
        self.image_size = image_size or side(config)
        self.num_prefix = PREFIX[config.model_type](config)
        self.spec = VisionSpec(
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            norm_eps=config.layer_norm_eps,
            patch_size=_one(config.patch_size, "patch_size"),
            has_cls=self.num_prefix > 0,
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
        output = self.model(
            **self._arguments(pixels), output_hidden_states=True, output_attentions=request.cls_attention
        )
        found = []
        for layer in layers:
            state = output.hidden_states[layer][:count]
            cls = state[:, 0] if request.cls else None
            attention = None
            if request.cls_attention:
                block = (layer if layer >= 0 else layer + self.spec.num_layers + 1) - 1
                attention = output.attentions[block][:count, :, 0, self.num_prefix :]
            found.append((state[:, self.num_prefix :], cls, attention))
        return found

    def _arguments(self, pixels: Tensor) -> dict[str, Any]:
        """What the tower takes for images (crops, 3, height, width)."""
        config, (height, width) = self.model.config, pixels.shape[-2:]
        if config.model_type in ("clip_vision_model", "siglip_vision_model"):
            resized = (height, width) != (config.image_size,) * 2
            return {"pixel_values": pixels, "interpolate_pos_encoding": resized}
        if config.model_type != "siglip2_vision_model":
            return {"pixel_values": pixels}  # these interpolate by themselves
        grid, patch = self.grid(height, width), self.spec.patch_size
        patches = rearrange(
            pixels[..., : grid[0] * patch, : grid[1] * patch],
            "crops channels (height rows) (width columns) -> crops (height width) (rows columns channels)",
            rows=patch,
            columns=patch,
        )
        mask = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)
        shapes = torch.tensor([grid] * len(pixels), device=pixels.device)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
