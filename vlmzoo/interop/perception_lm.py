"""PerceptionLM."""

from __future__ import annotations

from typing import Any

from vlmzoo.connector import NORMED
from vlmzoo.interop.architecture import Architecture, expect, parts
from vlmzoo.interop.weights import Rule, same
from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel
from vlmzoo.vision.towers import num_prefix


def _config(config: Any) -> dict[str, Any]:
    expect(config.vision_use_cls_token, num_prefix(config.vision_config) == 1, "vision_use_cls_token")
    return {"vision_layer": NORMED, "connector_options": {"factor": config.projector_pooling_ratio}}


def _rules(config: Any) -> list[Rule]:
    return [
        *parts("model.vision_tower."),
        same("model.multi_modal_projector.linear_1.**", "connector.inner.project.up.**"),
        same("model.multi_modal_projector.linear_2.**", "connector.inner.project.down.**"),
    ]


def _tiles(inputs: dict[str, Any], model: VisionLanguageModel) -> None:
    """Pixels (images, tiles, 3, height, width), whose tiles are so many images to the LLM."""
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)


def _back(config: VisionLanguageConfig) -> dict[str, Any]:
    expect(config.vision_config.model_type, "timm_wrapper", "the encoder's type")
    expect("embed_dim" in (config.vision_config.model_args or {}), True, "embed_dim in the encoder's model_args")
    expect(config.vision_layer, NORMED, "the encoder's layer")
    return {
        "vision_use_cls_token": num_prefix(config.vision_config) == 1,
        "projector_pooling_ratio": config.connector_options["factor"],
    }


PERCEPTION_LM = Architecture("PerceptionLMForConditionalGeneration", "perception_lm", _config, _rules, _tiles, _back)
