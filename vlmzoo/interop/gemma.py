"""PaliGemma and Gemma 3."""

from __future__ import annotations

import math
from typing import Any

import torch

from vlmzoo.connector import NORMED
from vlmzoo.interop.architecture import Architecture, expect, parts
from vlmzoo.interop.weights import Rule, same
from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel


def _paligemma(config: Any) -> dict[str, Any]:
    expect(config.vision_config.model_type, "siglip_vision_model", "the encoder's type")
    return {"vision_layer": NORMED, "bidirectional": "prefix"}


def _paligemma_rules(config: Any) -> list[Rule]:
    return [
        *parts("model.vision_tower."),
        same("model.multi_modal_projector.linear.**", "connector.inner.project.**"),
    ]


def _prefix(inputs: dict[str, Any], model: VisionLanguageModel) -> None:
    if (kinds := inputs.pop("token_type_ids", None)) is not None:
        inputs["blocks"] = torch.where(kinds == 0, 0, -1)


def _paligemma_back(config: VisionLanguageConfig) -> dict[str, Any]:
    _expect_parts(config, ("gemma", "gemma2"), "prefix")
    return {
        "vision_config": {**config.vision_config.to_dict(), "projection_dim": config.text_config.hidden_size},
        "projection_dim": config.text_config.hidden_size,
        "hidden_size": config.text_config.hidden_size,
    }


def _expect_parts(config: VisionLanguageConfig, language: tuple[str, ...], bidirectional: str) -> None:
    expect(config.vision_config.model_type, "siglip_vision_model", "the encoder's type")
    kind = config.text_config.model_type
    expect(kind, kind if kind in language else language[0], "the LLM's type")
    expect(config.vision_layer, NORMED, "the encoder's layer")
    expect(config.bidirectional, bidirectional, "bidirectional")


def _gemma3(config: Any) -> dict[str, Any]:
    expect(config.vision_config.model_type, "siglip_vision_model", "the encoder's type")
    side = config.vision_config.image_size // config.vision_config.patch_size
    factor = side // math.isqrt(config.mm_tokens_per_image)
    expect(config.mm_tokens_per_image, (side // factor) ** 2, "mm_tokens_per_image")
    return {"vision_layer": NORMED, "bidirectional": "image", "connector_options": {"factor": factor}}


def _gemma3_rules(config: Any) -> list[Rule]:
    projector = "model.multi_modal_projector"
    return [
        *parts("model.vision_tower."),
        same(f"{projector}.mm_soft_emb_norm.**", "connector.inner.norm.**"),
        Rule(
            (f"{projector}.mm_input_projection_weight",),
            ("connector.inner.project.weight",),
            lambda t: (t[0].T.contiguous(),),
            lambda t: (t[0].T.contiguous(),),
        ),
    ]


def _images(inputs: dict[str, Any], model: VisionLanguageModel) -> None:
    """Neighbouring tokens of images are a block."""
    if (kinds := inputs.pop("token_type_ids", None)) is not None:
        is_image = kinds == 1
        starts = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
        inputs["blocks"] = torch.where(is_image, starts.cumsum(1) - 1, -1)


def _gemma3_back(config: VisionLanguageConfig) -> dict[str, Any]:
    _expect_parts(config, ("gemma3_text",), "image")
    side = config.vision_config.image_size // config.vision_config.patch_size
    return {"mm_tokens_per_image": (side // config.connector_options["factor"]) ** 2}


PALIGEMMA = Architecture(
    "PaliGemmaForConditionalGeneration", "linear", _paligemma, _paligemma_rules, _prefix, _paligemma_back
)
GEMMA_3 = Architecture("Gemma3ForConditionalGeneration", "gemma3", _gemma3, _gemma3_rules, _images, _gemma3_back)
