"""What several connectors are made of: attention, feed-forward, and the memory of an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlmzoo.connector import VisualInput
from vlmzoo.kernels.attention import latent_attention
from vlmzoo.registry import unknown

KeysValues = tuple[Tensor, Tensor]
"""Both (batch, length, heads, head_dim)."""


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "squared_relu": squared_relu,
    "swiglu": F.silu,  # the gate's
}


def at_least_one(connector: str, **counts: int) -> None:
    """Refuses options that count something and are not positive."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"connector {connector!r}: {name} must be at least 1, got {count}")


@dataclass(frozen=True)
class BlockShape:
    """What a block of attention and feed-forward looks like, apart from its width."""

    num_heads: int
    head_dim: int
    ffn_multiplier: float
    activation: str
    qk_norm: bool


class FeedForward(nn.Module):
    """W_down act(W_up x); for `swiglu` W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, dim: int, intermediate_size: int, activation: str, *, bias: bool = False) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Linear(dim, intermediate_size, bias=bias) if activation == "swiglu" else None
        self.up = nn.Linear(dim, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class MultiHeadAttention(nn.Module):
    """Attention of hidden states over keys and values, which are projected apart so that they can be kept."""

    def __init__(
        self,
        dim: int,
        memory_dim: int,
        *,
        num_heads: int,
        head_dim: int,
        bias: bool = False,
        qk_norm: Callable[[int], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.key = nn.Linear(memory_dim, num_heads * head_dim, bias=bias)
        self.value = nn.Linear(memory_dim, num_heads * head_dim, bias=bias)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=bias)
        self.query_norm, self.key_norm = qk_norm(head_dim), qk_norm(head_dim)

    def keys_values(self, memory: Tensor) -> KeysValues:
        """Keys and values of a memory (batch, length, memory_dim)."""
        value = self._heads(self.value(memory))
        return self.key_norm(self._heads(self.key(memory))).type_as(value), value

    def forward(
        self, hidden: Tensor, memory: KeysValues, latents: KeysValues | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(batch, length, dim); `mask` as in `latent_attention`, over the keys of the memory, then of the latents."""
        k, v = memory
        k2, v2 = latents or (None, None)
        q = self.query_norm(self._heads(self.query(hidden))).type_as(v)  # autocast leaves norms in float32
        out = latent_attention(q, k, v, k2=k2, v2=v2, mask=mask)
        return self.out(rearrange(out, "batch length heads dim -> batch length (heads dim)"))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "batch length (heads dim) -> batch length heads dim", heads=self.num_heads)


def image_memory(visual: VisualInput, *, cls: bool = False) -> tuple[Tensor, Tensor]:
    """All crops of each image one behind the other, (images, tokens, vision_dim), and which are real, (images, tokens).

    With `cls` that token stands before the patches of its crop. What is not real is 0.
    """
    (features,) = visual.maps
    mask = features.mask
    values = features.values.masked_fill(~mask[..., None], 0)
    if cls:
        assert features.cls is not None
        values = torch.cat([features.cls[:, None], values], 1)
        mask = F.pad(mask, (1, 0), value=True)
    if len(values) == visual.num_images:
        return values, mask
    crops = [layout.num_crops for layout in visual.layouts]
    values, mask = (
        nn.utils.rnn.pad_sequence([image.flatten(0, 1) for image in tensor.split(crops)], batch_first=True)
        for tensor in (values, mask)
    )
    return values, mask
