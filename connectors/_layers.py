"""What several connectors are made of: attention, feed-forward, and the memory of an image."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlmzoo.connector import Grid, TokenConnector, VisualInput, side_by_side
from vlmzoo.kernels.attention import latent_attention, media_attention
from vlmzoo.kernels.resampler import fold, resampler_attention
from vlmzoo.registry import unknown

MANY = 256
"""Media an image from which on it pays to normalise them once for all layers, on a CPU."""

KeysValues = tuple[Tensor, Tensor]
"""Both (batch, length, heads, head_dim); of the images in a text (batch, images, length, heads, head_dim)."""


class GridConnector(TokenConnector):
    """A connector whose tokens stand on a grid of their own."""

    @abstractmethod
    def output_grid(self, grid: Grid) -> Grid: ...

    def num_tokens(self, grid: Grid) -> int:
        height, width = self.output_grid(grid)
        return height * width


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "gelu_tanh": gelu_tanh,
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
    num_kv_heads: int | None = None  # None: as many as heads


class FeedForward(nn.Module):
    """W_down act(W_up x); for `swiglu` W_down (silu(W_gate x) * W_up x). Its width stays, where `out_dim` is None."""

    def __init__(
        self, dim: int, intermediate_size: int, activation: str, *, bias: bool = False, out_dim: int | None = None
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Linear(dim, intermediate_size, bias=bias) if activation == "swiglu" else None
        self.up = nn.Linear(dim, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, out_dim or dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class MultiHeadAttention(nn.Module):
    """Attention of hidden states over keys and values, which are projected apart so that they can be kept.

    With `num_kv_heads` several heads share one key and one value (grouped-query attention).
    """

    def __init__(
        self,
        dim: int,
        memory_dim: int,
        *,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        bias: bool = False,
        qk_norm: Callable[[int], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"attention: {num_heads} heads cannot share {num_kv_heads} keys and values evenly")
        self.head_dim, self.sharing = head_dim, num_heads // num_kv_heads
        self.query = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.key = nn.Linear(memory_dim, num_kv_heads * head_dim, bias=bias)
        self.value = nn.Linear(memory_dim, num_kv_heads * head_dim, bias=bias)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=bias)
        self.query_norm, self.key_norm = qk_norm(head_dim), qk_norm(head_dim)

    def keys(self, memory: Tensor) -> Tensor:
        """Keys (…, length, heads, head_dim) of a memory (…, length, memory_dim)."""
        return self.key_norm(self._heads(self.key(memory)))

    def values(self, memory: Tensor) -> Tensor:
        """Values (…, length, heads, head_dim) of a memory (…, length, memory_dim)."""
        return self._heads(self.value(memory))

    def keys_values(self, memory: Tensor) -> KeysValues:
        """Both, of one memory."""
        values = self.values(memory)
        return self.keys(memory).type_as(values), values  # autocast leaves norms in float32

    def forward(
        self, hidden: Tensor, memory: KeysValues, latents: KeysValues | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(batch, length, dim); `mask` as in `latent_attention`, over the keys of the memory, then of the latents."""
        k, v = memory
        k2, v2 = latents or (None, None)
        if self.sharing > 1:
            k, v = self._shared(k), self._shared(v)
            k2, v2 = (None, None) if k2 is None or v2 is None else (self._shared(k2), self._shared(v2))
        return self.output(latent_attention(self.queries(hidden).type_as(v), k, v, k2=k2, v2=v2, mask=mask))

    def queries(self, hidden: Tensor) -> Tensor:
        """Queries (batch, length, heads, head_dim) of hidden states (batch, length, dim)."""
        return self.query_norm(self._heads(self.query(hidden)))

    def output(self, read: Tensor) -> Tensor:
        """(batch, length, dim) of what each head read, (batch, length, heads, head_dim)."""
        return self.out(rearrange(read, "batch length heads dim -> batch length (heads dim)"))

    def read_normalized(
        self,
        hidden: Tensor,
        media: Tensor,
        norm: nn.LayerNorm,
        latents: KeysValues | None = None,
        mask: Tensor | None = None,
        *,
        recompute: bool = False,
    ) -> Tensor:
        """(batch, length, dim), read in `norm` of media that `normalize` has normalised already; of as many heads.

        Args:
            mask: (batch, tokens) of the media alone, True = a real one
            recompute: see `resampler_attention`
        """
        folded = []
        for part in (self.key, self.value):
            weight, bias = fold(part.weight, (norm.weight, norm.bias))
            folded.append((weight, bias if part.bias is None else bias + part.bias))
        k2, v2 = latents or (None, None)
        key_norm = self.key_norm
        read = resampler_attention(
            self.queries(hidden).type_as(media),
            media,
            *folded,
            key_norm=(key_norm.weight, key_norm.bias) if isinstance(key_norm, nn.LayerNorm) else None,
            k2=k2,
            v2=v2,
            mask=mask,
            recompute=recompute,
        )
        return self.output(read)

    def read_media(
        self,
        hidden: Tensor,
        media: KeysValues,
        image_of_token: Tensor,
        mask: Tensor,
        gate: Tensor,
        residual: Tensor,
    ) -> Tensor:
        """residual + tanh(gate) · what each token reads in its image; see `media_attention`. Bias-free attention only.

        Args:
            media: keys and values of (batch, images, tokens)
            mask: (batch, images, tokens), True = a real one
        """
        k, v = (self._shared(x) for x in media) if self.sharing > 1 else media
        q = self.queries(hidden).type_as(v)
        return media_attention(
            q, k, v, image_of_token, mask=mask, project=self.out.weight, gate=gate, residual=residual
        )

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "... (heads dim) -> ... heads dim", dim=self.head_dim)

    def _shared(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.sharing, dim=-2)


def image_memory(visual: VisualInput, *, cls: bool = False) -> tuple[Tensor, Tensor]:
    """All crops of each image one behind the other, (images, tokens, vision_dim), and which are real, (images, tokens).

    Several layers stand side by side, in the last dimension. With `cls` that token stands before the patches of its
    crop. Padding is 0; a crop behind those that tile its image is what the encoder makes of it, and not real.
    """
    mask = visual.maps[0].mask
    values = side_by_side(visual).masked_fill(~mask[..., None], 0)
    if cls:
        tokens = [features.cls for features in visual.maps if features.cls is not None]
        values = torch.cat([torch.cat(tokens, -1)[:, None], values], 1)
        mask = F.pad(mask, (1, 0), value=True)
    if any(layout.tiling for layout in visual.layouts):
        shown = [
            layout.tiling is None or crop < math.prod(layout.tiling)
            for layout in visual.layouts
            for crop in range(layout.num_crops)
        ]
        mask = mask & torch.tensor(shown, device=mask.device)[:, None]
    if len(values) == visual.num_images:
        return values, mask
    crops = [layout.num_crops for layout in visual.layouts]
    values, mask = (
        nn.utils.rnn.pad_sequence([image.flatten(0, 1) for image in tensor.split(crops)], batch_first=True)
        for tensor in (values, mask)
    )
    return values, mask


def to_map(patches: Tensor, grid: Grid) -> Tensor:
    """(crops, patches, dim) -> (crops, dim, height, width)."""
    return rearrange(patches, "crops (height width) dim -> crops dim height width", height=grid[0])


def to_tokens(features: Tensor) -> Tensor:
    """(crops, dim, height, width) -> (crops, tokens, dim)."""
    return rearrange(features, "crops dim height width -> crops (height width) dim")


def merged(connector: str, grid: Grid, factor: int) -> Grid:
    """The grid of blocks of `factor` x `factor` patches.

    Raises:
        ValueError: blocks do not fill it.
    """
    if grid[0] % factor or grid[1] % factor:
        raise ValueError(
            f"connector {connector!r}: a grid of {grid[0]} x {grid[1]} patches is not filled by blocks of "
            f"{factor} x {factor}"
        )
    return grid[0] // factor, grid[1] // factor


def merge_patches(patches: Tensor, grid: Grid, factor: int) -> Tensor:
    """Blocks of patches as channels, row by row: (crops, patches / factor², factor² · dim)."""
    return rearrange(
        patches,
        "crops (height rows width columns) dim -> crops (height width) (rows columns dim)",
        rows=factor,
        columns=factor,
        height=grid[0] // factor,
    )


def pooled(grid: Grid, side: int) -> Grid:
    """What adaptive pooling to `side` x `side` leaves of a grid; it never makes more of fewer patches."""
    return min(grid[0], side), min(grid[1], side)


def pool(patches: Tensor, grid: Grid, output: Grid) -> Tensor:
    """Means over the regions of an output grid, (crops, tokens, dim)."""
    return to_tokens(F.adaptive_avg_pool2d(to_map(patches, grid), output))


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of a map (crops, dim, height, width)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Channels weighted by what a bottleneck reads from their means.

    Source: Hu et al., Squeeze-and-Excitation Networks (2018), section 3.
    """

    def __init__(
        self, dim: int, bottleneck: int, activation: Callable[[Tensor], Tensor], gate: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim)
        self.activation, self.gate = activation, gate

    def forward(self, features: Tensor) -> Tensor:
        weights = self.gate(self.up(self.activation(self.down(features.mean((2, 3))))))
        return features * weights[:, :, None, None]
