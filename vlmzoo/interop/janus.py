"""Janus, as far as it reads images; what draws them is left out."""

from __future__ import annotations

from typing import Any

from vlmzoo.connector import NORMED
from vlmzoo.interop.architecture import Architecture, expect, parts
from vlmzoo.interop.weights import Rule, dropped, same


def _config(config: Any) -> dict[str, Any]:
    expect(config.vision_config.hidden_act, "gelu", "vision_config.hidden_act, the aligner's,")
    return {"vision_layer": NORMED, "connector_options": {"depth": config.vision_config.depth}}


def _rules(config: Any) -> list[Rule]:
    between = (
        same(f"model.aligner.hidden_layers.{index}.**", f"connector.inner.layers.{2 * index + 2}.**")
        for index in range(config.vision_config.depth - 1)
    )
    return [
        *parts("model.vision_model."),
        same("model.aligner.fc1.**", "connector.inner.layers.0.**"),
        *between,
        *(dropped(f"model.{part}.**") for part in ("vqmodel", "generation_embeddings", "generation_aligner")),
        dropped("model.generation_head.**"),
    ]


JANUS = Architecture("JanusForConditionalGeneration", "mlp", _config, _rules)
