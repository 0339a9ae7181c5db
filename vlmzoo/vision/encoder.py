"""Patch features from a vision tower of transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmzoo.connector import NORMED, FeatureMap, FeatureRequest, Grid, Layer
from vlmzoo.vision.towers import image_side, num_prefix, spec, tower


class VisionEncoder(nn.Module):
    """A vision tower whose hidden states are read as patch features.

    Args:
        model: a transformers vision model of a type in `TOWERS`; what stands behind its last hidden state is taken off.
        layer: of its hidden states, for connectors that ask for none themselves. LLaVA reads -2.
        image_size: pixels a side; another than the tower's own interpolates its position embeddings.

    Raises:
        ValueError: a model type that is not known, a layer the tower lacks, a size its patches do not fill.

    Source: Liu et al., Visual Instruction Tuning (2023), section 4.1: hidden states before the tower's last norm.
    """

    chunk_size: int | None = 8
    """Crops encoded at once, the last chunk padded, so that a crop's features depend on no other; None: all at once."""

    def __init__(self, model: PreTrainedModel, *, layer: Layer = -2, image_size: int | None = None) -> None:
        super().__init__()
        config = model.config
        self.tower = tower(config)
        self.tower.trim(model)
        self.model = model
        self.layer: Layer = layer
        self.image_size = image_size or image_side(config)
        self.num_prefix = num_prefix(config)
        self.num_tiles = config.max_num_tiles if self.tower.tiled else 1
        self.spec = spec(config)
        self._check_layer(layer)
        self.grid(self.image_size, self.image_size)

    def grid(self, height: int, width: int) -> Grid:
        """(height, width) in patches of an image of that many pixels."""
        patch = self.spec.patch_size
        if height < patch or width < patch:
            raise ValueError(f"image of {height} x {width} pixels: the encoder's patches are {patch} pixels a side")
        return height // patch, width // patch

    def _check_layer(self, layer: Layer) -> None:
        if layer == NORMED:
            return
        if not self.tower.hidden_states:
            raise ValueError(f"encoder layer {layer}: a {self.model.config.model_type} gives its {NORMED} alone")
        states = self.spec.num_layers + 1
        if not (isinstance(layer, int) and -states <= layer < states):
            raise ValueError(
                f"encoder layer {layer}: the tower has hidden states {-states} to {states - 1}, and {NORMED}"
            )

    def index(self, layer: Layer) -> Layer:
        """A hidden state's one name: counted from the embeddings, 0."""
        return layer % (self.spec.num_layers + 1) if isinstance(layer, int) else layer

    def encode(
        self,
        pixel_values: Tensor,
        request: FeatureRequest,
        sizes: Sequence[tuple[int, int]] | None = None,
        tilings: Sequence[Grid] | None = None,
    ) -> tuple[FeatureMap, ...]:
        """One feature map a requested layer, from pixel values (crops, 3, height, width).

        Args:
            pixel_values: also (crops, 3 · frames, height, width) for Qwen-VL's towers, channel by channel.
            sizes: (height, width) in pixels of each crop, where some are padded on the right and below.
            tilings: (rows, columns) of each image's crops, for a tower that encodes them together: an image then has
                `num_tiles` crops, and those behind its own are empty. None: each crop is an image of its own.

        Raises:
            ValueError: a layer or CLS that the tower lacks, crops of several sizes for one that takes a single one, or
                tilings that fit neither the tower nor the crops.
        """
        layers = request.layers or (self.layer,)
        for layer in layers:
            self._check_layer(layer)
        if request.cls and not self.spec.has_cls:
            raise ValueError(f"a CLS feature was asked of a {self.model.config.model_type}, which has none")
        height, width = pixel_values.shape[-2:]
        grids = [self.grid(*size) for size in sizes or [(height, width)] * len(pixel_values)]
        if not self.tower.mixed and set(grids) != {self.grid(height, width)}:
            kind = self.model.config.model_type
            raise ValueError(f"a {kind} encodes crops of one size; expected all of {height} x {width} pixels")
        tiles, shapes = self.num_tiles, grids
        if self.tower.tiled:
            if tilings is None:
                return self._encode_alone(pixel_values, request)
            if len(pixel_values) != len(tilings) * tiles:
                raise ValueError(
                    f"{len(tilings)} tilings were passed for {len(pixel_values)} crops; expected {tiles} each"
                )
            shapes = list(tilings)
        chunk = max(1, (self.chunk_size or len(pixel_values)) // tiles) * tiles
        trained = any(parameter.requires_grad for parameter in self.model.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            parts = [
                self._encode_chunk(
                    part, shapes[start * chunk // tiles : (start + 1) * chunk // tiles], chunk, layers, request
                )
                for start, part in enumerate(pixel_values.split(chunk))
            ]
        maps = []
        counts = torch.tensor([rows * columns for rows, columns in grids], device=pixel_values.device)
        for found in zip(*parts, strict=True):
            most = max(part.shape[1] for part, *_ in found)  # of patches: chunks of several sizes differ
            same = all(part.shape[1] == most for part, *_ in found)
            values = torch.cat([part if same else F.pad(part, (0, 0, 0, most - part.shape[1])) for part, *_ in found])
            cls, attention = (
                None if part[0] is None else torch.cat(part) for part in list(zip(*found, strict=True))[1:]
            )
            mask = torch.arange(values.shape[1], device=values.device) < counts.to(values.device)[:, None]
            maps.append(FeatureMap(values, tuple(grids), mask, cls, attention))
        return tuple(maps)

    def _encode_alone(self, pixels: Tensor, request: FeatureRequest) -> tuple[FeatureMap, ...]:
        """Each crop as an image of one tile, by a tower that has places for several."""
        tiles = pixels.new_zeros(len(pixels), self.num_tiles, *pixels.shape[1:])
        tiles[:, 0] = pixels
        maps = self.encode(tiles.flatten(0, 1), request, tilings=[(1, 1)] * len(pixels))
        own = slice(None, None, self.num_tiles)
        return tuple(
            FeatureMap(
                found.values[own], found.grids[own], found.mask[own], None if found.cls is None else found.cls[own]
            )
            for found in maps
        )

    def _encode_chunk(
        self, pixels: Tensor, shapes: list[Grid], chunk: int, layers: tuple[Layer, ...], request: FeatureRequest
    ) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Values, CLS and its attention of so many crops a layer; `shapes` are grids or, of a tiled tower, tilings."""
        count, full = len(pixels), self.grid(*pixels.shape[-2:])
        filler = (1, 1) if self.tower.tiled else full
        padded = [*shapes, *[filler] * ((chunk - count) // self.num_tiles)]
        pixels = torch.cat([pixels, pixels.new_zeros(chunk - count, *pixels.shape[1:])]).to(self.model.dtype)
        output = self.model(
            **self.tower.inputs(self.model.config, pixels, padded),
            output_hidden_states=True,
            output_attentions=request.cls_attention,
        )
        found = []
        for layer in layers:
            state = output.last_hidden_state if layer == NORMED else output.hidden_states[layer]
            if self.tower.arrange is not None:
                state = self.tower.arrange(self.model.config, state, padded, full)
            state = state[:count]
            cls = state[:, 0] if request.cls else None
            attention = None
            if request.cls_attention:
                last = self.spec.num_layers if layer == NORMED else self.index(layer)
                assert isinstance(last, int)
                attention = output.attentions[last - 1][:count, :, 0, self.num_prefix :]
            found.append((state[:, self.num_prefix :], cls, attention))
        return found
