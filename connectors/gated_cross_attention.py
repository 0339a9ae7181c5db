"""Layers inside the LLM that attend to the last image, behind gates that start closed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmzoo.connector import (
    Connector,
    ImageLayout,
    InLLMLayer,
    LayerContext,
    TextSpec,
    VisionSpec,
    VisualInput,
    VisualTokens,
    register,
)
from vlmzoo.connectors._layers import (
    BlockShape,
    FeedForward,
    KeysValues,
    MultiHeadAttention,
    at_least_one,
    image_memory,
)
from vlmzoo.connectors.perceiver import PerceiverResampler
from vlmzoo.registry import unknown


class GatedCrossAttentionBlock(InLLMLayer):
    """x + tanh(a) attention(norm(x), image), then x + tanh(b) feed-forward(norm(x)); a and b start at 0."""

    def __init__(self, dim: int, memory_dim: int, shape: BlockShape, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.attention_norm = norm(dim)
        self.attention = MultiHeadAttention(
            dim,
            memory_dim,
            num_heads=shape.num_heads,
            head_dim=shape.head_dim,
            num_kv_heads=shape.num_kv_heads,
            qk_norm=norm if shape.qk_norm else nn.Identity,
        )
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward_norm = norm(dim)
        self.feed_forward = FeedForward(dim, round(shape.ffn_multiplier * dim), shape.activation)
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, context: LayerContext) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(self._run, hidden, context, use_reentrant=False)
        return self._run(hidden, context)

    def _run(self, hidden: Tensor, context: LayerContext) -> Tensor:
        if context.memory is not None and context.memory_mask is not None:
            hidden = self.attention.read_media(
                self.attention_norm(hidden),
                self.keys_values(context.memory, context),
                context.image_of_token,
                context.memory_mask,
                self.attention_gate,
                hidden,
            )
        return hidden + self.feed_forward_gate.tanh() * self.feed_forward(self.feed_forward_norm(hidden))

    def keys_values(self, memory: Tensor, context: LayerContext) -> KeysValues:
        """Of a memory (batch, images, tokens, dim), once for all steps of a `generate`."""
        if context.cache is not None and self in context.cache:
            return context.cache[self]
        keys_values = self.attention.keys_values(memory)
        if context.cache is not None:
            context.cache[self] = keys_values
        return keys_values


@register("gated_cross_attention")
class GatedCrossAttention(Connector):
    """A memory and one slot an image: text reads the image in gated cross-attention blocks inside the LLM.

    A block stands before every n-th decoder layer, the first before layer `first_layer` (None: `every` - 1, so that
    (i + 1) % every == 0 as in Flamingo; Idefics: 0). The slot holds one learned marker. Text sees the last image at or
    before it. The memory is what Flamingo's resampler makes of the image, or with "patches" the patches themselves;
    all crops of an image make one memory.

    Source: Alayrac et al., Flamingo (2022), sections 3.1.2 and 3.1.3, appendix A.1 and table 5 (squared ReLU). Number
    and width of the heads as in OpenFlamingo (2023), whose activation is "gelu". Idefics-1 (Laurençon et al., OBELICS,
    2023): norm "rms", activation "swiglu", `qk_norm`.
    Differs: no end-of-chunk token; a learned marker instead of a trained `<image>` embedding in the LLM; `activation`
    and `qk_norm` hold for the resampler too.
    """

    def __init__(
        self,
        vision: VisionSpec,
        text: TextSpec,
        *,
        memory: Literal["resampler", "patches"] = "resampler",
        every: int = 4,
        first_layer: int | None = None,
        num_heads: int = 8,
        head_dim: int = 64,
        ffn_multiplier: float = 4,
        activation: str = "squared_relu",
        norm: Literal["layer", "rms"] = "layer",
        qk_norm: bool = False,
        num_latents: int = 64,
        num_resampler_layers: int = 6,
    ) -> None:
        super().__init__()
        at_least_one(
            "gated_cross_attention",
            every=every,
            num_heads=num_heads,
            num_latents=num_latents,
            num_resampler_layers=num_resampler_layers,
        )
        if memory not in ("resampler", "patches"):
            raise unknown("memory of connector 'gated_cross_attention'", memory, ("resampler", "patches"))
        norms: dict[str, Callable[[int], nn.Module]] = {
            "layer": nn.LayerNorm,
            "rms": partial(nn.RMSNorm, eps=text.norm_eps),
        }
        if norm not in norms:
            raise unknown("norm of connector 'gated_cross_attention'", norm, norms)
        first_layer = every - 1 if first_layer is None else first_layer
        if not 0 <= first_layer < text.num_layers:
            raise ValueError(
                f"connector 'gated_cross_attention': its first block would stand before layer {first_layer} of an LLM "
                f"that has layers 0 to {text.num_layers - 1}; lower `every` or give `first_layer`"
            )
        shape = BlockShape(num_heads, head_dim, ffn_multiplier, activation, qk_norm)
        self.resampler = None
        if memory == "resampler":
            self.resampler = PerceiverResampler(vision.hidden_size, num_latents, num_resampler_layers, shape)
        self.marker = nn.Parameter(torch.empty(text.hidden_size).normal_(std=0.02))
        self.blocks = nn.ModuleDict(
            {
                str(layer): GatedCrossAttentionBlock(text.hidden_size, vision.hidden_size, shape, norms[norm])
                for layer in range(first_layer, text.num_layers, every)
            }
        )

    def num_tokens(self, image: ImageLayout) -> int:
        return 1

    def forward(self, visual: VisualInput) -> VisualTokens:
        memory, memory_mask = image_memory(visual)
        if self.resampler is not None:
            memory = self.resampler(memory, memory_mask)
            memory_mask = memory_mask.new_ones(memory.shape[:2])
        marker = self.marker.expand(visual.num_images, 1, -1)
        return VisualTokens(marker, memory_mask.new_ones(marker.shape[:2]), memory, memory_mask)

    def llm_layers(self) -> Mapping[int, Sequence[InLLMLayer]]:
        return {int(layer): [block] for layer, block in self.blocks.items() if isinstance(block, InLLMLayer)}
