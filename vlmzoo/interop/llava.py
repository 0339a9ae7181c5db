"""LLaVA and ViP-LLaVA."""

from __future__ import annotations

from typing import Any

import torch

from vlmzoo.connector import NORMED
from vlmzoo.interop.architecture import Architecture, UnsupportedError, expect, parts, without_cls
from vlmzoo.interop.weights import Rule, same
from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel
from vlmzoo.vision.towers import num_prefix


def _llava(config: Any) -> dict[str, Any]:
    expect(config.projector_hidden_act, "gelu", "projector_hidden_act")
    expect(config.multimodal_projector_bias, True, "multimodal_projector_bias")
    without_cls(config.vision_config, config.vision_feature_select_strategy)
    layer = config.vision_feature_layer
    return {"vision_layer": layer} if isinstance(layer, int) else {"connector_options": {"layers": list(layer)}}


def _llava_rules(config: Any) -> list[Rule]:
    return [
        *parts("model.vision_tower."),
        same("model.multi_modal_projector.linear_1.**", "connector.inner.layers.0.**"),
        same("model.multi_modal_projector.linear_2.**", "connector.inner.layers.2.**"),
    ]


def sized_crops(inputs: dict[str, Any], model: VisionLanguageModel) -> None:
    """Pixtral's crops have sizes of their own."""
    if (sizes := inputs.pop("image_sizes", None)) is not None:
        inputs["crop_sizes"] = torch.as_tensor(sizes)


def _llava_back(config: VisionLanguageConfig) -> dict[str, Any]:
    expect(config.connector_options["depth"], 2, "depth of the connector")
    return {
        "vision_feature_layer": list(config.connector_options["layers"]) or hidden_state(config),
        "vision_feature_select_strategy": strategy(config),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
    }


def hidden_state(config: VisionLanguageConfig) -> int:
    """The encoder layer that is read, for classes that know hidden states alone."""
    if config.vision_layer == NORMED:
        raise UnsupportedError(f"the encoder's layer is {NORMED}, expected the index of a hidden state")
    return config.vision_layer


def strategy(config: VisionLanguageConfig) -> str:
    """What LLaVA's classes call leaving CLS out."""
    return "default" if num_prefix(config.vision_config) == 1 else "full"


def _vip_llava(config: Any) -> dict[str, Any]:
    expect(config.projector_hidden_act, "gelu", "projector_hidden_act")
    without_cls(config.vision_config, "default")
    layers = config.vision_feature_layers if hasattr(config, "vision_feature_layers") else config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    return {"connector_options": {"layers": layers, "norm_eps": config.projector_layernorm_eps}}


def _vip_llava_rules(config: Any) -> list[Rule]:
    return [
        *parts("model.vision_tower."),
        same("model.multi_modal_projector.projector_layernorm.**", "connector.inner.norm.**"),
        same("model.multi_modal_projector.linear_1.**", "connector.inner.project.up.**"),
        same("model.multi_modal_projector.linear_2.**", "connector.inner.project.down.**"),
    ]


def _vip_llava_back(config: VisionLanguageConfig) -> dict[str, Any]:
    expect(strategy(config), "default", "the encoder's CLS")
    options = config.connector_options
    return {
        "vision_feature_layers": list(options["layers"]),
        "projector_layernorm_eps": options["norm_eps"],
        "projector_hidden_act": "gelu",
    }


LLAVA = Architecture("LlavaForConditionalGeneration", "mlp", _llava, _llava_rules, sized_crops, _llava_back)
VIP_LLAVA = Architecture(
    "VipLlavaForConditionalGeneration", "vip_llava", _vip_llava, _vip_llava_rules, back=_vip_llava_back
)
