"""Mistral 3."""

from __future__ import annotations

from typing import Any

from vlmzoo.interop.architecture import Architecture, UnsupportedError, expect, parts
from vlmzoo.interop.llava import hidden_state, sized_crops
from vlmzoo.interop.weights import Rule, same
from vlmzoo.model import VisionLanguageConfig


def _config(config: Any) -> dict[str, Any]:
    expect(config.projector_hidden_act, "gelu", "projector_hidden_act")
    expect(config.multimodal_projector_bias, False, "multimodal_projector_bias")
    if not isinstance(config.vision_feature_layer, int):
        raise UnsupportedError(f"vision_feature_layer is {config.vision_feature_layer!r}, expected one layer")
    return {
        "vision_layer": config.vision_feature_layer,
        "connector_options": {"factor": config.spatial_merge_size},
    }


def _rules(config: Any) -> list[Rule]:
    return [
        *parts("model.vision_tower."),
        same("model.multi_modal_projector.norm.**", "connector.inner.norm.**"),
        same("model.multi_modal_projector.patch_merger.merging_layer.**", "connector.inner.merge.**"),
        same("model.multi_modal_projector.linear_1.**", "connector.inner.project.up.**"),
        same("model.multi_modal_projector.linear_2.**", "connector.inner.project.down.**"),
    ]


def _back(config: VisionLanguageConfig) -> dict[str, Any]:
    expect(config.vision_config.model_type, "pixtral", "the encoder's type")
    return {
        "vision_feature_layer": hidden_state(config),
        "spatial_merge_size": config.connector_options["factor"],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": False,
    }


MISTRAL_3 = Architecture("Mistral3ForConditionalGeneration", "mistral3", _config, _rules, sized_crops, _back)
