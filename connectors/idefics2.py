"""Patches in the LLM's width, read by latents that share keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmzoo.connector import Connector, ImageLayout, TextSpec, VisionSpec, VisualInput, VisualTokens, register
from vlmzoo.connectors._layers import FeedForward, MultiHeadAttention, at_least_one, image_memory

NORM_EPS = 1e-6


class ResamplerLayer(nn.Module):
    """Latents after they attended to media and latents, and after their feed-forward."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, num_kv_heads: int) -> None:
        super().__init__()
        self.media_norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.latent_norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.attention = MultiHeadAttention(dim, dim, num_heads=num_heads, head_dim=head_dim, num_kv_heads=num_kv_heads)
        self.feed_forward_norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.feed_forward = FeedForward(dim, 4 * dim, "swiglu")

    def forward(self, latents: Tensor, media: Tensor, mask: Tensor) -> Tensor:
        queries = self.latent_norm(latents)
        keys_values = self.attention.keys_values
        latents = latents + self.attention(queries, keys_values(self.media_norm(media)), keys_values(queries), mask)
        return latents + self.feed_forward(self.feed_forward_norm(latents))


@register("idefics2")
class Idefics2(Connector):
    """`num_latents` tokens an image, whatever its size: a gated MLP a patch, then a perceiver of the LLM's width.

    All crops of an image are read together.

    Source: Laurençon et al., What matters when building vision-language models? (Idefics2, 2024), sections 3.2 and 4.1.
    """

    def __init__(
        self,
        vision: VisionSpec,
        text: TextSpec,
        *,
        num_latents: int = 64,
        num_layers: int = 3,
        num_heads: int = 16,
        num_kv_heads: int = 4,
        head_dim: int = 96,
    ) -> None:
        super().__init__()
        at_least_one("idefics2", num_latents=num_latents, num_layers=num_layers, num_heads=num_heads)
        dim = text.hidden_size
        self.project = FeedForward(vision.hidden_size, text.intermediate_size, "swiglu", out_dim=dim)
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(ResamplerLayer(dim, num_heads, head_dim, num_kv_heads) for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)

    def num_tokens(self, image: ImageLayout) -> int:
        return len(self.latents)

    def forward(self, visual: VisualInput) -> VisualTokens:
        media, mask = image_memory(visual)
        media, latents = self.project(media), self.latents.expand(len(media), -1, -1)
        mask = F.pad(mask, (0, len(self.latents)), value=True)[:, None, None]  # latents always see one another
        for layer in self.layers:
            latents = layer(latents, media, mask)
        tokens = self.norm(latents)
        return VisualTokens(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))
