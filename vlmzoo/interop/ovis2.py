"""Ovis 2. The embeddings of its visual indicators become the LLM's: these ids stand beside images alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Aimv2VisionConfig

from vlmzoo.connector import NORMED
from vlmzoo.interop.architecture import Architecture, expect, parts
from vlmzoo.interop.weights import Rule, Tensors, copied, same

SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "rms_norm_eps",
    "attention_dropout",
    "qkv_bias",
    "mlp_bias",
    "hidden_act",
)


def _config(config: Any) -> dict[str, Any]:
    vision = config.vision_config
    expect(vision.tokenize_function, "softmax", "vision_config.tokenize_function")
    values = {name: getattr(vision, name) for name in SHARED}
    options = {
        "vocab_size": vision.vocab_size - vision.num_visual_indicator_tokens,
        "factor": vision.hidden_stride,
    }
    tower = Aimv2VisionConfig(**values, use_head=False, is_native=False)
    return {"vision_config": tower, "vision_layer": NORMED, "connector_options": options}


def _rules(config: Any) -> list[Rule]:
    tower, words = "model.vision_tower", "model.language_model.embed_tokens.weight"
    count = config.vision_config.num_visual_indicator_tokens
    ids = list(config.visual_indicator_token_ids)

    def indicators(tensors: Tensors) -> Tensors:
        embeddings, table = tensors
        return torch.index_copy(embeddings, 0, torch.tensor(ids), table[-count:][: len(ids)]), table[:-count].clone()

    _, language, head = parts("")
    return [
        same(f"{tower}.transformer.embeddings.patch_embedding.**", "vision.model.embeddings.patch_embed.**"),
        same(f"{tower}.transformer.embeddings.position_embedding.**", "vision.model.embeddings.position_embedding.**"),
        same(f"{tower}.transformer.embeddings.rms_norm.**", "vision.model.embeddings.rms_norm.**"),
        same(f"{tower}.transformer.encoder.**", "vision.model.encoder.**"),
        same(f"{tower}.transformer.rms_norm.**", "vision.model.rms_norm.**"),
        same(f"{tower}.head_linear.**", "connector.inner.head.**"),
        same(f"{tower}.head_norm.**", "connector.inner.norm.**"),
        language,
        head,
        copied(words, "language.lm_head.weight") if config.tie_word_embeddings else head,
        Rule(
            (words, "model.visual_embeddings_table.weight"),
            ("language.model.embed_tokens.weight", "connector.inner.table.weight"),
            indicators,
        ),
    ]


OVIS_2 = Architecture("Ovis2ForConditionalGeneration", "ovis", _config, _rules, unties=True)
