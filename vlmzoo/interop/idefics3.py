"""Idefics 2, Idefics 3 and SmolVLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmzoo.connector import NORMED
from vlmzoo.interop.architecture import Architecture, expect
from vlmzoo.interop.weights import Rule, same
from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel

PARTS = [
    same("model.vision_model.**", "vision.model.**"),
    same("model.text_model.**", "language.model.**"),
    same("lm_head.**", "language.lm_head.**"),
]
PERCEIVER = [
    ("self_attn.q_proj", "attention.query"),
    ("self_attn.k_proj", "attention.key"),
    ("self_attn.v_proj", "attention.value"),
    ("self_attn.o_proj", "attention.out"),
    ("input_context_norm", "media_norm"),
    ("input_latents_norm", "latent_norm"),
    ("post_attention_layernorm", "feed_forward_norm"),
    ("mlp.gate_proj", "feed_forward.gate"),
    ("mlp.up_proj", "feed_forward.up"),
    ("mlp.down_proj", "feed_forward.down"),
]


def _crops(inputs: dict[str, Any], model: VisionLanguageModel) -> None:
    """Images (batch, images, 3, height, width) one behind the other, without those of zeros that fill the batch up."""
    pixels, mask = inputs.pop("pixel_values", None), inputs.pop("pixel_attention_mask", None)
    if pixels is None:
        return
    real = (pixels != 0).flatten(2).any(-1).flatten()
    inputs["pixel_values"] = pixels.flatten(0, 1)[real]
    if mask is not None:
        inputs["crop_sizes"] = _sizes(mask.flatten(0, 1)[real].bool())


def _sizes(mask: Tensor) -> Tensor:
    """Height and width (crops, 2) of what a mask (crops, height, width) shows, which begins at the top left.

    Raises:
        ValueError: it shows something else than a rectangle there.
    """
    height, width = mask.any(2).sum(1), mask.any(1).sum(1)
    rows = torch.arange(mask.shape[1], device=mask.device) < height[:, None]
    columns = torch.arange(mask.shape[2], device=mask.device) < width[:, None]
    if not torch.equal(mask, rows[:, :, None] & columns[:, None]):
        raise ValueError("pixel_attention_mask shows something else than a rectangle from the top left of each image")
    return torch.stack([height, width], 1)


def _idefics3(config: Any) -> dict[str, Any]:
    return {"vision_layer": NORMED, "connector_options": {"factor": config.scale_factor}}


def _idefics3_rules(config: Any) -> list[Rule]:
    return [*PARTS, same("model.connector.modality_projection.proj.**", "connector.inner.project.**")]


def _back(kind: str) -> Any:
    def back(config: VisionLanguageConfig) -> dict[str, Any]:
        expect(config.vision_config.model_type, kind, "the encoder's type")
        expect(config.vision_layer, NORMED, "the encoder's layer")
        return {"scale_factor": config.connector_options["factor"]}

    return back


def _idefics2(config: Any) -> dict[str, Any]:
    perceiver = config.perceiver_config
    expect(perceiver.hidden_act, "silu", "perceiver_config.hidden_act")
    expect(config.text_config.hidden_act, "silu", "text_config.hidden_act, the projection's,")
    expect(perceiver.hidden_size, config.text_config.hidden_size, "perceiver_config.hidden_size")
    expect(perceiver.rms_norm_eps, 1e-6, "perceiver_config.rms_norm_eps")
    options = {
        "num_latents": perceiver.resampler_n_latents,
        "num_layers": perceiver.resampler_depth,
        "num_heads": perceiver.resampler_n_heads,
        "num_kv_heads": perceiver.num_key_value_heads,
        "head_dim": perceiver.resampler_head_dim,
    }
    return {"vision_layer": NORMED, "connector_options": options}


def _idefics2_rules(config: Any) -> list[Rule]:
    resampler = "model.connector.perceiver_resampler"
    return [
        *PARTS,
        *(
            same(f"model.connector.modality_projection.{name}_proj.**", f"connector.project.{name}.**")
            for name in ("gate", "up", "down")
        ),
        same(f"{resampler}.latents", "connector.latents"),
        same(f"{resampler}.norm.**", "connector.norm.**"),
        *(same(f"{resampler}.layers.*.{theirs}.**", f"connector.layers.*.{ours}.**") for theirs, ours in PERCEIVER),
    ]


def _idefics2_back(config: VisionLanguageConfig) -> dict[str, Any]:
    expect(config.vision_config.model_type, "idefics2_vision", "the encoder's type")
    expect(config.vision_layer, NORMED, "the encoder's layer")
    options = config.connector_options
    return {
        "perceiver_config": {
            "hidden_size": config.text_config.hidden_size,
            "rms_norm_eps": 1e-6,
            "resampler_n_latents": options["num_latents"],
            "resampler_depth": options["num_layers"],
            "resampler_n_heads": options["num_heads"],
            "num_key_value_heads": options["num_kv_heads"],
            "resampler_head_dim": options["head_dim"],
        }
    }


IDEFICS_2 = Architecture(
    "Idefics2ForConditionalGeneration", "idefics2", _idefics2, _idefics2_rules, _crops, _idefics2_back
)
IDEFICS_3 = Architecture(
    "Idefics3ForConditionalGeneration", "idefics3", _idefics3, _idefics3_rules, _crops, _back("idefics3_vision")
)
SMOLVLM = Architecture(
    "SmolVLMForConditionalGeneration", "idefics3", _idefics3, _idefics3_rules, _crops, _back("smolvlm_vision")
)
