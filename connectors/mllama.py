"""Layers inside the LLM that attend to all patches of several depths of the encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from vlmzoo.connector import (
    Connector,
    FeatureRequest,
    ImageLayout,
    InLLMLayer,
    Layer,
    LayerContext,
    TextSpec,
    VisionSpec,
    VisualInput,
    VisualTokens,
    register,
)
from vlmzoo.connectors._layers import BlockShape, at_least_one, image_memory
from vlmzoo.connectors.gated_cross_attention import GatedCrossAttentionBlock
from vlmzoo.registry import unknown


def media_mask(image_of_token: Tensor, real: Tensor) -> Tensor:
    """(batch, length, images, tokens), where a token reads its image's."""
    images = torch.arange(real.shape[1], device=real.device)
    return (image_of_token[:, :, None, None] == images[:, None]) & real[:, None]


class MllamaBlock(GatedCrossAttentionBlock):
    """A gated block in which a token that sees no image gets nothing from the feed-forward either.

    Where it `reads_all`, such a token's attention reads whatever its sample's images hold.
    """

    def __init__(self, dim: int, shape: BlockShape, norm: Callable[[int], nn.Module], reads_all: bool) -> None:
        super().__init__(dim, dim, shape, norm)
        self.reads_all = reads_all

    def _run(self, hidden: Tensor, context: LayerContext) -> Tensor:
        memory, real = context.memory, context.memory_mask
        if memory is None or real is None:
            return hidden
        read = media_mask(context.image_of_token, real)
        sees = read.any((2, 3))
        keys, values = self.keys_values(memory, context)
        queries = self.attention_norm(hidden)
        if self.reads_all:
            everything = real.any(-1, keepdim=True).expand_as(real)
            mask = torch.where(sees[..., None, None], read, everything[:, None]).flatten(2)[:, None]
            found = self.attention(queries, (keys.flatten(1, 2), values.flatten(1, 2)), mask=mask)
            hidden = hidden + self.attention_gate.tanh() * found
        else:
            hidden = self.attention.read_media(
                queries, (keys, values), context.image_of_token, real, self.attention_gate, hidden
            )
        inner = self.feed_forward(self.feed_forward_norm(hidden)) * sees[..., None]
        return hidden + self.feed_forward_gate.tanh() * inner


@register("mllama")
class Mllama(Connector):
    """A memory of all patches and one slot an image: cross-attention layers of the LLM's own kind read it.

    A layer stands before every n-th decoder layer, the first before layer `every` - 1, or else before the layers that
    `before` names; the slot holds a learned marker. Four heads share a key and a value, unless `num_kv_heads` says
    otherwise. The memory is what `layers` of the encoder saw side by side, CLS included, through one linear layer.
    What the attention of a token that sees no image reads, `without_image` says: "nothing", or "everything" in its
    sample's images, empty crops and padding too, as in transformers' code.

    Source: Grattafiori et al., The Llama 3 Herd of Models (2024), section 7.2, and Llama 3.2's published code.
    Differs: a token sees the last image alone, also where several follow one another; a learned marker instead of a
    trained embedding.
    """

    def __init__(
        self,
        vision: VisionSpec,
        text: TextSpec,
        *,
        every: int = 4,
        before: tuple[int, ...] = (),
        num_kv_heads: int | None = None,
        layers: tuple[Layer, ...] = (-1, 3, 7, 15, 23),
        without_image: Literal["nothing", "everything"] = "nothing",
    ) -> None:
        super().__init__()
        num_kv_heads = max(1, text.num_heads // 4) if num_kv_heads is None else num_kv_heads
        at_least_one("mllama", every=every, num_kv_heads=num_kv_heads)
        if without_image not in ("nothing", "everything"):
            raise unknown("without_image of connector 'mllama'", without_image, ("nothing", "everything"))
        places = tuple(before) or tuple(range(every - 1, text.num_layers, every))
        if len(set(places)) < len(places) or not set(places) <= set(range(text.num_layers + 1)):
            raise ValueError(
                f"connector 'mllama': `before` is {list(before)}, expected different layers from 0 to {text.num_layers}"
            )
        if not places:
            raise ValueError(
                f"connector 'mllama': its first layer would stand before layer {every - 1} of an LLM that has layers "
                f"0 to {text.num_layers - 1}; lower `every`"
            )
        if not layers:
            raise ValueError("connector 'mllama': expected at least one of the encoder's layers in `layers`")
        self.requires = FeatureRequest(layers=tuple(layers), cls=vision.has_cls)
        dim, num_heads = text.hidden_size, text.num_heads
        shape = BlockShape(
            num_heads, dim // num_heads, text.intermediate_size / dim, "swiglu", qk_norm=True, num_kv_heads=num_kv_heads
        )
        self.project = nn.Linear(len(layers) * vision.hidden_size, dim)
        self.marker = nn.Parameter(torch.empty(dim).normal_(std=0.02))
        norm = partial(nn.RMSNorm, eps=text.norm_eps)
        reads_all = without_image == "everything"
        self.blocks = nn.ModuleDict({str(layer): MllamaBlock(dim, shape, norm, reads_all) for layer in places})

    def num_tokens(self, image: ImageLayout) -> int:
        return 1

    def forward(self, visual: VisualInput) -> VisualTokens:
        memory, memory_mask = image_memory(visual, cls=self.requires.cls)
        marker = self.marker.expand(visual.num_images, 1, -1)
        return VisualTokens(marker, memory_mask.new_ones(marker.shape[:2]), self.project(memory), memory_mask)

    def llm_layers(self) -> Mapping[int, Sequence[InLLMLayer]]:
        return {int(layer): [block] for layer, block in self.blocks.items() if isinstance(block, InLLMLayer)}
