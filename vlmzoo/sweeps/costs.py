"""What a connector makes and costs between an encoder and an LLM of real size, counted without any weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlmzoo import build
from vlmzoo.config import ConnectorConfig
from vlmzoo.connector import (
    Connector,
    FeatureMap,
    Grid,
    ImageLayout,
    Instruction,
    LayerContext,
    TextSpec,
    VisionSpec,
    VisualInput,
    VisualTokens,
)

GRID: Grid = (24, 24)  # 336 pixels in patches of 14
TEXT_LENGTH = 64  # tokens of text beside the image, for layers inside the LLM and for instructions
BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Cost:
    """Of one image of `GRID` patches, with `TEXT_LENGTH` tokens of text."""

    tokens: int
    parameters: int  # layers inside the LLM included
    flops: int  # of a forward pass through the connector and its layers inside the LLM
    weight_bytes: int
    activation_bytes: int  # kept for the backward pass


@dataclass(frozen=True)
class Unweighted:
    """A connector without weights, and what it gets: one image, and text behind it, (1, `TEXT_LENGTH`, text_dim)."""

    connector: Connector
    visual: VisualInput
    text: Tensor

    def run(self) -> tuple[VisualTokens, Tensor]:
        """What the connector makes of the image, and the hidden states behind all its layers inside the LLM."""
        found = self.connector(self.visual)
        slots = found.tokens.shape[1]
        hidden = torch.cat([found.tokens, self.text], 1)
        memory = None if found.memory is None else found.memory[:, None]
        memory_mask = None if found.memory_mask is None else found.memory_mask[:, None]
        seen = torch.zeros(hidden.shape[:2], dtype=torch.long, device="meta")
        places = torch.zeros(1, 1, slots, dtype=torch.long, device="meta")
        for layers in self.connector.llm_layers().values():
            for layer in layers:
                hidden = layer(hidden, LayerContext(memory, memory_mask, seen, token_of_slot=places))
        return found, hidden


def unweighted(
    name: str, vision_dim: int, text_dim: int, options: Mapping[str, Any] | None = None, *, text_layers: int = 32
) -> Unweighted:
    """A registered connector between a ViT of `vision_dim` and a Llama of `text_dim`, on the meta device.

    Both are as CLIP-L and Llama-7B in all else: 24 and 32 layers, heads of 64 and 128 channels.

    Raises:
        ValueError: an unknown name or option, or sizes that the connector refuses.
    """
    vision = VisionSpec(vision_dim, 24, max(1, vision_dim // 64), norm_eps=1e-5, patch_size=14, has_cls=True)
    text = TextSpec(
        text_dim, text_layers, max(1, text_dim // 128), 1e-5, intermediate_size=text_dim * 43 // 16, vocab_size=32_000
    )
    resolved = build.connector_options(ConnectorConfig(name, dict(options or {})))
    with torch.device("meta"):
        connector = build.connector(name, resolved, vision=vision, text=text).eval().bfloat16()
        visual = _image(connector, vision, text)
        hidden = torch.zeros(1, TEXT_LENGTH, text_dim, dtype=torch.bfloat16)
    return Unweighted(connector, visual, hidden)


def cost(name: str, vision_dim: int, text_dim: int, options: Mapping[str, Any] | None = None) -> Cost:
    """What `unweighted` costs.

    Raises:
        ValueError: what `unweighted` raises.
    """
    parts = unweighted(name, vision_dim, text_dim, options)
    connector = parts.connector
    weights = {_storage(parameter) for parameter in connector.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in weights:
            kept[_storage(tensor)] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda same: same):
        parts.run()
    parameters = sum(parameter.numel() for parameter in connector.parameters())
    return Cost(
        tokens=connector.num_tokens(parts.visual.layouts[0]),
        parameters=parameters,
        flops=counter.get_total_flops(),
        weight_bytes=BYTES * parameters,
        activation_bytes=sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _image(connector: Connector, vision: VisionSpec, text: TextSpec) -> VisualInput:
    """One image, with all that the connector asks for."""
    request, patches = connector.requires, GRID[0] * GRID[1]

    def features() -> FeatureMap:
        return FeatureMap.dense(
            torch.zeros(1, patches, vision.hidden_size, dtype=torch.bfloat16),
            GRID,
            torch.zeros(1, vision.hidden_size, dtype=torch.bfloat16) if request.cls else None,
            torch.zeros(1, vision.num_heads, patches, dtype=torch.bfloat16) if request.cls_attention else None,
        )

    ids = torch.zeros(1, TEXT_LENGTH, dtype=torch.long)
    return VisualInput(
        maps=tuple(features() for _ in request.layers or (None,)),
        image_of_crop=torch.zeros(1, dtype=torch.long),
        sample_of_image=torch.zeros(1, dtype=torch.long),
        layouts=(ImageLayout((GRID,)),),
        instruction=Instruction(ids, torch.ones_like(ids, dtype=torch.bool)) if request.instruction else None,
    )
