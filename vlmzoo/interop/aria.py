"""Aria."""

from __future__ import annotations

from typing import Any

from vlmzoo.interop.architecture import Architecture, expect, parts
from vlmzoo.interop.idefics3 import rounded_up, sizes_of
from vlmzoo.interop.llava import hidden_state
from vlmzoo.interop.weights import Rule, chunks, same
from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel

NAMES = [
    ("cross_attn.q_proj", "query"),
    ("cross_attn.k_proj", "key"),
    ("cross_attn.v_proj", "value"),
    ("cross_attn.multihead_attn.out_proj", "attention.out"),
    ("cross_attn.linear", "out"),
    ("cross_attn.layer_norm", "query_norm"),
    ("cross_attn.layer_norm_kv", "memory_norm"),
    ("layer_norm", "norm"),
    ("feed_forward.linear_in", "project.up"),
    ("feed_forward.linear_out", "project.down"),
]


def _config(config: Any) -> dict[str, Any]:
    queries = {int(patches): count for patches, count in config.projector_patch_to_query_dict.items()}
    few, many = min(queries), max(queries)
    expect(len(queries), 2, "number of entries in projector_patch_to_query_dict")
    expect(queries[many], 2 * queries[few], "the larger number of queries")
    return {
        "vision_layer": config.vision_feature_layer,
        "connector_options": {"num_queries": queries[few], "many_patches": few},
    }


def _rules(config: Any) -> list[Rule]:
    projector = "model.multi_modal_projector"
    fused = [
        chunks(
            f"{projector}.cross_attn.multihead_attn.in_proj_{kind}",
            *(f"connector.inner.attention.{part}.{kind}" for part in ("query", "key", "value")),
        )
        for kind in ("weight", "bias")
    ]
    return [
        *parts("model.vision_tower."),
        same(f"{projector}.query", "connector.inner.queries"),
        *fused,
        *(same(f"{projector}.{theirs}.**", f"connector.inner.{ours}.**") for theirs, ours in NAMES),
    ]


def _sizes(inputs: dict[str, Any], model: VisionLanguageModel) -> None:
    if (mask := inputs.pop("pixel_mask", None)) is not None:
        inputs["crop_sizes"] = rounded_up(sizes_of(mask.bool()), mask.shape[1:], model.config.vision_config.patch_size)


def _back(config: VisionLanguageConfig) -> dict[str, Any]:
    expect(config.vision_config.model_type, "idefics3_vision", "the encoder's type")
    expect(config.text_config.model_type, "aria_text", "the LLM's type")
    options = config.connector_options
    queries, few = options["num_queries"], options["many_patches"]
    return {
        "vision_feature_layer": hidden_state(config),
        "projector_patch_to_query_dict": {few: queries, 4 * few: 2 * queries},
    }


ARIA = Architecture("AriaForConditionalGeneration", "aria", _config, _rules, _sizes, _back)
