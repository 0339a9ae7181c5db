"""LLaVA-NeXT and, as far as it reads images, LLaVA-OneVision."""

from __future__ import annotations

import re
from typing import Any

import torch

from vlmzoo.connector import connectors
from vlmzoo.interop.architecture import Architecture, UnsupportedError, expect, parts, without_cls
from vlmzoo.interop.llava import hidden_state, strategy
from vlmzoo.interop.weights import Rule, same
from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel
from vlmzoo.vision.towers import image_side


def _next(config: Any) -> dict[str, Any]:
    expect(config.projector_hidden_act, "gelu", "projector_hidden_act")
    expect(config.multimodal_projector_bias, True, "multimodal_projector_bias")
    without_cls(config.vision_config, config.vision_feature_select_strategy)
    layer, side = config.vision_feature_layer, config.vision_config.image_size
    if any(length % side for pinpoint in config.image_grid_pinpoints for length in pinpoint):
        raise UnsupportedError(f"image_grid_pinpoints are {config.image_grid_pinpoints}, expected multiples of {side}")
    options = {
        "connector": "mlp",
        "options": {"depth": 2, "layers": [] if isinstance(layer, int) else list(layer)},
        "grid_pinpoints": [[height // side, width // side] for height, width in config.image_grid_pinpoints],
        "tile_size": side,
    }
    return {"connector_options": options} | ({"vision_layer": layer} if isinstance(layer, int) else {})


def _onevision(config: Any) -> dict[str, Any]:
    if (found := re.fullmatch(r"anyres_max_(\d+)", config.vision_aspect_ratio)) is None:
        raise UnsupportedError(
            f"vision_aspect_ratio is {config.vision_aspect_ratio!r}, expected 'anyres_max_' and a number"
        )
    values = _next(config)
    values["connector_options"]["max_tiles"] = int(found[1])
    return values


def _rules(config: Any) -> list[Rule]:
    return [
        *parts("model.vision_tower."),
        same("model.image_newline", "connector.newline"),
        same("model.multi_modal_projector.linear_1.**", "connector.inner.inner.layers.0.**"),
        same("model.multi_modal_projector.linear_2.**", "connector.inner.inner.layers.2.**"),
    ]


def _crops(inputs: dict[str, Any], model: VisionLanguageModel) -> None:
    """Crops (images, most crops, 3, height, width) one behind the other, without those that fill the batch up.

    With `batch_num_images` only a sample's single image is cut into tiles.
    """
    pixels, num_images = inputs.get("pixel_values"), inputs.pop("batch_num_images", None)
    if pixels is None:
        return
    if inputs.get("image_sizes") is None:
        raise ValueError("pixel_values came without image_sizes, (height, width) of each original in pixels")
    sizes = torch.as_tensor(inputs["image_sizes"])
    cut = [True] * len(sizes)
    if num_images is not None:
        cut = [count == 1 for count in torch.as_tensor(num_images).tolist() for _ in range(count)]
    crop = model.vision.grid(model.vision.image_size, model.vision.image_size)
    counts = []
    for (height, width), has_tiles in zip(sizes.tolist(), cut, strict=True):
        rows, columns = (has_tiles and model.connector.tiles((height, width), crop)) or (0, 0)
        counts.append(1 + rows * columns)
    if pixels.dim() == 5:
        pixels = torch.cat([image[:count] for image, count in zip(pixels, counts, strict=True)])
    inputs |= {"pixel_values": pixels, "num_crops": torch.tensor(counts), "image_sizes": sizes}


def _next_back(config: VisionLanguageConfig) -> dict[str, Any]:
    options = config.connector_options
    expect(options["connector"], "mlp", "connector within the connector")
    inner = connectors.resolve("mlp", options["options"] or {})
    expect(inner["depth"], 2, "depth of the connector within the connector")
    side, patch = image_side(config.vision_config), config.vision_config.patch_size
    expect(config.image_size or side, side, "image_size")
    expect(options["tile_size"] or side // patch * patch, side, "tile_size of the connector")
    return {
        "vision_feature_layer": list(inner["layers"]) or hidden_state(config),
        "vision_feature_select_strategy": strategy(config),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "image_grid_pinpoints": [[rows * side, columns * side] for rows, columns in options["grid_pinpoints"]],
    }


def _llava_next_back(config: VisionLanguageConfig) -> dict[str, Any]:
    expect(config.connector_options["max_tiles"], None, "max_tiles of the connector")
    return _next_back(config)


def _onevision_back(config: VisionLanguageConfig) -> dict[str, Any]:
    if (most := config.connector_options["max_tiles"]) is None:
        raise UnsupportedError("max_tiles of the connector is None, expected a number")
    return {**_next_back(config), "vision_aspect_ratio": f"anyres_max_{most}"}


LLAVA_NEXT = Architecture("LlavaNextForConditionalGeneration", "anyres", _next, _rules, _crops, _llava_next_back)
LLAVA_ONEVISION = Architecture(
    "LlavaOnevisionForConditionalGeneration", "anyres", _onevision, _rules, _crops, _onevision_back
)
