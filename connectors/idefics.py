"""Gated cross-attention of the LLM's own kind, to a resampled image or to its patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from vlmzoo.connector import (
    Connector,
    FeatureRequest,
    ImageLayout,
    InLLMLayer,
    TextSpec,
    VisionSpec,
    VisualInput,
    VisualTokens,
    register,
)
from vlmzoo.connectors._layers import BlockShape, at_least_one, image_memory
from vlmzoo.connectors.gated_cross_attention import GatedCrossAttentionBlock
from vlmzoo.connectors.perceiver import PerceiverResampler


@register("idefics")
class Idefics(Connector):
    """A memory and one slot an image: gated blocks as wide as the LLM's own read it; the slot holds a learned marker.

    A block stands before every n-th decoder layer, the first before layer 0. Text sees the last image at or before it.
    The memory is what the resampler makes of all hidden states of the encoder's layer, CLS included; without
    `resampler` these themselves.

    Source: Laurençon et al., OBELICS (2023), section 4.2, and Idefics' published code and configuration (9B).
    Differs: a learned marker instead of a trained `<image>` embedding in the LLM; an image is seen also behind an
    end-of-sequence token.
    """

    def __init__(
        self,
        vision: VisionSpec,
        text: TextSpec,
        *,
        every: int = 4,
        qk_norm: bool = True,
        resampler: bool = True,
        num_latents: int = 64,
        num_resampler_layers: int = 6,
        num_resampler_heads: int = 16,
        resampler_head_dim: int = 96,
        resampler_qk_norm: bool = True,
    ) -> None:
        super().__init__()
        at_least_one(
            "idefics",
            every=every,
            num_latents=num_latents,
            num_resampler_layers=num_resampler_layers,
            num_resampler_heads=num_resampler_heads,
        )
        self.requires = FeatureRequest(cls=vision.has_cls)
        self.resampler = None
        if resampler:
            shape = BlockShape(num_resampler_heads, resampler_head_dim, 4, "relu", resampler_qk_norm)
            self.resampler = PerceiverResampler(vision.hidden_size, num_latents, num_resampler_layers, shape)
        dim, heads = text.hidden_size, text.num_heads
        shape = BlockShape(heads, dim // heads, text.intermediate_size / dim, "swiglu", qk_norm)
        norm = partial(nn.RMSNorm, eps=text.norm_eps)
        self.marker = nn.Parameter(torch.empty(dim).normal_(std=0.02))
        self.blocks = nn.ModuleDict(
            {
                str(layer): GatedCrossAttentionBlock(dim, vision.hidden_size, shape, norm)
                for layer in range(0, text.num_layers, every)
            }
        )

    def num_tokens(self, image: ImageLayout) -> int:
        return 1

    def forward(self, visual: VisualInput) -> VisualTokens:
        memory, memory_mask = image_memory(visual, cls=self.requires.cls)
        if self.resampler is not None:
            memory = self.resampler(memory, memory_mask)
            memory_mask = memory_mask.new_ones(memory.shape[:2])
        marker = self.marker.expand(visual.num_images, 1, -1)
        return VisualTokens(marker, memory_mask.new_ones(marker.shape[:2]), memory, memory_mask)

    def llm_layers(self) -> Mapping[int, Sequence[InLLMLayer]]:
        return {int(layer): [block] for layer, block in self.blocks.items() if isinstance(block, InLLMLayer)}
