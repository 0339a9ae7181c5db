"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, as far as they read images; what they know of videos is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vlmzoo.connector import NORMED
from vlmzoo.interop.architecture import Architecture, UnsupportedError, expect
from vlmzoo.interop.weights import Rule, same
from vlmzoo.language.positions import has_axes
from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel
from vlmzoo.vision.blocks import to_crop

PARTS = [
    *(same(f"model.visual.{part}.**", f"vision.model.{part}.**") for part in ("patch_embed", "pos_embed", "blocks")),
    same("model.language_model.**", "language.model.**"),
    same("lm_head.**", "language.lm_head.**"),
]


def _crops(inputs: dict[str, Any], model: VisionLanguageModel) -> None:
    """Patches of all images one behind the other (patches, channels · frames · patch²) as padded crops.

    Raises:
        ValueError: a video, or grids that the patches do not fill.
    """
    if inputs.pop("pixel_values_videos", None) is not None:
        raise ValueError("pixel_values_videos is given, expected images alone")
    for name in ("mm_token_type_ids", "video_grid_thw"):
        inputs.pop(name, None)
    patches, sizes = inputs.get("pixel_values"), inputs.pop("image_grid_thw", None)
    if patches is None or patches.dim() != 2:  # none, or crops already
        return
    if sizes is None:
        raise ValueError("pixel_values are patches, expected image_grid_thw with them")
    vision: Any = model.config.vision_config
    merge = vision.spatial_merge_size
    grids = [(height, width) for _, height, width in sizes.tolist()]
    counts = [height * width for height, width in grids]
    if sum(counts) != len(patches) or (sizes[:, 0] != 1).any() or (sizes[:, 1:] % merge).any():
        raise ValueError(
            f"image_grid_thw is {sizes.tolist()}, expected grids of images (1, height, width) with {len(patches)} "
            f"patches in all, filled by blocks of {merge} x {merge}"
        )
    crops = [to_crop(vision, part, grid) for part, grid in zip(patches.split(counts), grids, strict=True)]
    inputs["crop_sizes"] = sizes[:, 1:] * vision.patch_size
    inputs["pixel_values"] = _padded(crops)


def _padded(crops: list[Tensor]) -> Tensor:
    """Crops (channels, height, width) of several sizes with zeros on the right and below."""
    height, width = (max(crop.shape[side] for crop in crops) for side in (1, 2))
    padded = crops[0].new_zeros(len(crops), crops[0].shape[0], height, width)
    for place, crop in zip(padded, crops, strict=True):
        place[:, : crop.shape[1], : crop.shape[2]] = crop
    return padded


def _expect_axes(config: Any) -> None:
    """Without it theirs falls back on sections of its class, and ours takes the LLM for one of text alone."""
    if not has_axes(config.text_config):
        raise UnsupportedError("text_config.rope_parameters has no mrope_section")


def _config(norm: str) -> Callable[[Any], dict[str, Any]]:
    def read(config: Any) -> dict[str, Any]:
        _expect_axes(config)
        options = {"factor": config.vision_config.spatial_merge_size, "norm": norm}
        return {"vision_layer": -1, "connector_options": options}

    return read


def _rules(config: Any) -> list[Rule]:
    return [
        *PARTS,
        same("model.visual.merger.ln_q.**", "connector.inner.merger.norm.**"),
        same("model.visual.merger.mlp.0.**", "connector.inner.merger.project.up.**"),
        same("model.visual.merger.mlp.2.**", "connector.inner.merger.project.down.**"),
    ]


def _parts_back(config: VisionLanguageConfig, kind: str, width: str) -> dict[str, Any]:
    """The vision configuration of a class with these parts.

    Args:
        width: what it calls the LLM's width.
    """
    vision: Any = config.vision_config
    expect(vision.model_type, f"{kind}_vision", "the encoder's type")
    expect(config.text_config.model_type, f"{kind}_text", "the LLM's type")
    expect(config.connector_options["factor"], vision.spatial_merge_size, "the connector's factor")
    return {**vision.to_dict(), width: config.text_config.hidden_size}


def _back(kind: str, norm: str, width: str) -> Callable[[VisionLanguageConfig], dict[str, Any]]:
    def back(config: VisionLanguageConfig) -> dict[str, Any]:
        vision = _parts_back(config, kind, width)
        expect(config.connector_options["norm"], norm, "the connector's norm")
        if config.vision_layer not in (-1, config.vision_config.num_hidden_layers, NORMED):
            raise UnsupportedError(f"the encoder's layer is {config.vision_layer}, expected the last")
        return {"vision_config": vision}

    return back


def _qwen3(config: Any) -> dict[str, Any]:
    _expect_axes(config)
    depths = list(config.vision_config.deepstack_visual_indexes)
    expect(depths, sorted(set(depths)), "vision_config.deepstack_visual_indexes")
    options = {
        "layers": [depth + 1 for depth in depths],  # theirs counts blocks, ours what they give
        "last_layer": -1,
        "factor": config.vision_config.spatial_merge_size,
    }
    return {"vision_layer": -1, "connector_options": options}


def _qwen3_rules(config: Any) -> list[Rule]:
    names = ("norm", "norm"), ("linear_fc1", "project.up"), ("linear_fc2", "project.down")
    return [
        *PARTS,
        *(same(f"model.visual.merger.{theirs}.**", f"connector.merger.{ours}.**") for theirs, ours in names),
        *(
            same(f"model.visual.deepstack_merger_list.*.{theirs}.**", f"connector.depths.*.{ours}.**")
            for theirs, ours in names
        ),
    ]


def _qwen3_back(config: VisionLanguageConfig) -> dict[str, Any]:
    vision, options = _parts_back(config, "qwen3_vl", "out_hidden_size"), config.connector_options
    states = vision["depth"] + 1
    layers = [layer % states for layer in options["layers"]]
    expect(options["last_layer"] % states, states - 1, "last_layer of the connector")
    expect(layers, sorted(set(layers) - {0}), "layers of the connector")
    return {"vision_config": {**vision, "deepstack_visual_indexes": [layer - 1 for layer in layers]}}


QWEN2_VL = Architecture(
    "Qwen2VLForConditionalGeneration",
    "qwen2_vl",
    _config("layer"),
    _rules,
    _crops,
    _back("qwen2_vl", "layer", "hidden_size"),
)
QWEN2_5_VL = Architecture(
    "Qwen2_5_VLForConditionalGeneration",
    "qwen2_vl",
    _config("rms"),
    _rules,
    _crops,
    _back("qwen2_5_vl", "rms", "out_hidden_size"),
)
QWEN3_VL = Architecture("Qwen3VLForConditionalGeneration", "deepstack", _qwen3, _qwen3_rules, _crops, _qwen3_back)
