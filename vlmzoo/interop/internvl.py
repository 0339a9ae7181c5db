"""InternVL."""

from __future__ import annotations

from typing import Any

from vlmzoo.connector import NORMED
from vlmzoo.interop.architecture import Architecture, UnsupportedError, expect, parts, without_cls
from vlmzoo.interop.weights import Rule, same
from vlmzoo.model import VisionLanguageConfig


def _config(config: Any) -> dict[str, Any]:
    expect(config.projector_hidden_act, "gelu", "projector_hidden_act")
    without_cls(config.vision_config, config.vision_feature_select_strategy)
    if not isinstance(config.vision_feature_layer, int):
        raise UnsupportedError(f"vision_feature_layer is {config.vision_feature_layer!r}, expected one layer")
    last = config.vision_feature_layer == -1  # which is the last hidden state behind the norm to this class
    factor = round(1 / config.downsample_ratio)
    expect(config.downsample_ratio, 1 / factor, "downsample_ratio")
    return {
        "vision_layer": NORMED if last else config.vision_feature_layer,
        "connector_options": {"factor": factor},
    }


def _rules(config: Any) -> list[Rule]:
    return [
        *parts("model.vision_tower."),
        same("model.multi_modal_projector.layer_norm.**", "connector.inner.norm.**"),
        same("model.multi_modal_projector.linear_1.**", "connector.inner.project.up.**"),
        same("model.multi_modal_projector.linear_2.**", "connector.inner.project.down.**"),
    ]


def _back(config: VisionLanguageConfig) -> dict[str, Any]:
    expect(config.vision_config.model_type, "internvl_vision", "the encoder's type")
    if config.vision_layer == -1:
        raise UnsupportedError(f"the encoder's layer is -1, expected {NORMED} or the index of an earlier one")
    return {
        "vision_feature_layer": -1 if config.vision_layer == NORMED else config.vision_layer,
        "vision_feature_select_strategy": "default",
        "downsample_ratio": 1 / config.connector_options["factor"],
        "projector_hidden_act": "gelu",
    }


INTERNVL = Architecture("InternVLForConditionalGeneration", "internvl", _config, _rules, back=_back)
