"""Learned latents that read the image, layer by layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmzoo.connector import Connector, ImageLayout, VisualInput, VisualTokens, register
from vlmzoo.connectors._layers import MANY, BlockShape, FeedForward, MultiHeadAttention, at_least_one, image_memory
from vlmzoo.kernels.resampler import normalize


class ResamplerLayer(nn.Module):
    """Latents after they attended to media and latents, and after their feed-forward."""

    def __init__(self, dim: int, shape: BlockShape) -> None:
        super().__init__()
        self.media_norm = nn.LayerNorm(dim)
        self.latent_norm = nn.LayerNorm(dim)
        self.attention = MultiHeadAttention(
            dim,
            dim,
            num_heads=shape.num_heads,
            head_dim=shape.head_dim,
            qk_norm=nn.LayerNorm if shape.qk_norm else nn.Identity,
        )
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, int(shape.ffn_multiplier * dim), shape.activation)

    def forward(
        self, latents: Tensor, media: Tensor, mask: Tensor | None, *, normalized: bool, recompute: bool
    ) -> Tensor:
        queries = self.latent_norm(latents)
        keys_values = self.attention.keys_values
        if normalized:
            latent = keys_values(queries)
            read = self.attention.read_normalized(queries, media, self.media_norm, latent, mask, recompute=recompute)
        else:
            read = self.attention(queries, keys_values(self.media_norm(media)), keys_values(queries), mask)
        latents = latents + read
        return latents + self.feed_forward(self.feed_forward_norm(latents))


class PerceiverResampler(nn.Module):
    """(images, num_latents, dim) from media (images, tokens, dim); the mask (images, tokens) says which are real.

    With `gradient_checkpointing` nothing as long as `MANY` media or more is kept for the backward pass, but the media.
    """

    def __init__(self, dim: int, num_latents: int, num_layers: int, shape: BlockShape) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(ResamplerLayer(dim, shape) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, media: Tensor, mask: Tensor | None = None) -> Tensor:
        latents = self.latents.expand(len(media), -1, -1)
        normalized = media.shape[1] >= MANY
        if normalized:
            media = normalize(media)
        elif mask is not None:
            mask = F.pad(mask, (0, len(self.latents)), value=True)[:, None, None]  # latents always see one another
        recompute = self.gradient_checkpointing and self.training
        for layer in self.layers:
            latents = layer(latents, media, mask, normalized=normalized, recompute=recompute)
        return self.norm(latents)


@register("perceiver")
class PerceiverConnector(Connector):
    """`num_latents` tokens an image, whatever its size: Flamingo's resampler and a projection to the LLM's width.

    All crops of an image are read together, as Flamingo reads the frames of a video.

    Source: Alayrac et al., Flamingo (2022), section 3.1.1, appendix A.1.1 and table 5 (squared ReLU). Number and width
    of the heads as in OpenFlamingo (2023), whose activation is "gelu". Idefics-1: activation "relu", `qk_norm`.
    Differs: the latents become tokens of the LLM's input, by one linear layer; there are no time embeddings.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        *,
        num_latents: int = 64,
        num_layers: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        ffn_multiplier: float = 4,
        activation: str = "squared_relu",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        at_least_one("perceiver", num_latents=num_latents, num_layers=num_layers, num_heads=num_heads)
        shape = BlockShape(num_heads, head_dim, ffn_multiplier, activation, qk_norm)
        self.resampler = PerceiverResampler(vision_dim, num_latents, num_layers, shape)
        self.project = nn.Linear(vision_dim, text_dim)

    def num_tokens(self, image: ImageLayout) -> int:
        return len(self.resampler.latents)

    def forward(self, visual: VisualInput) -> VisualTokens:
        tokens = self.project(self.resampler(*image_memory(visual)))
        return VisualTokens(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))
