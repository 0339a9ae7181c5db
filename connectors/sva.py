"""Queries that each look at their own window of every encoder's features, before the LLM and inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlmzoo.connector import (
    Connector,
    Grid,
    ImageLayout,
    InLLMLayer,
    LayerContext,
    TextSpec,
    VisionSpec,
    VisualInput,
    VisualTokens,
    map_crops,
    register,
)
from vlmzoo.connectors._layers import FeedForward, at_least_one, to_map
from vlmzoo.kernels.attention import latent_attention


class WindowAttention(nn.Module):
    """One query (queries, 1, dim) attends to a window of each encoder, (queries, window², dim) each."""

    def __init__(self, dim: int, num_sources: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_norm, self.query = nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False)
        self.key_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(num_sources))
        self.keys = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(num_sources))
        self.value_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(num_sources))
        self.values = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(num_sources))
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, queries: Tensor, windows: Sequence[Tensor]) -> Tensor:
        q = self.query(self.query_norm(queries))
        k = torch.cat([a(n(w)) for a, n, w in zip(self.keys, self.key_norms, windows, strict=True)], 1)
        v = torch.cat([a(n(w)) for a, n, w in zip(self.values, self.value_norms, windows, strict=True)], 1)
        q, k, v = (
            rearrange(x, "many length (heads dim) -> many length heads dim", heads=self.num_heads) for x in (q, k, v)
        )
        return self.out(latent_attention(q.type_as(v), k.type_as(v), v).flatten(2))


class Sampler(nn.Module):
    """Queries (queries, 1, query_dim) after they looked at their windows, with what the whole image is like beside."""

    def __init__(self, query_dim: int, dim: int, num_sources: int, window: int, num_heads: int) -> None:
        super().__init__()
        self.context = nn.Linear(dim, dim, bias=False)
        self.enter = nn.Linear(query_dim + dim, dim, bias=False)
        self.attention = WindowAttention(dim, num_sources, num_heads)
        self.norm = nn.LayerNorm(dim)
        self.leave = FeedForward(dim, dim, "gelu", out_dim=query_dim)
        shape = (num_sources, window**2, dim)
        self.positions = nn.Parameter(torch.randn(shape)) if window > 1 else None

    def forward(self, queries: Tensor, windows: Tensor, context: Tensor) -> Tensor:
        """From windows (queries, sources, window², dim) and context (queries, 1, dim)."""
        if self.positions is not None:
            windows = windows + self.positions.to(windows.dtype)
        inner = self.enter(torch.cat([queries, self.context(context).type_as(queries)], -1))
        inner = self.norm(inner + self.attention(inner, windows.unbind(1)))
        return queries + self.leave(inner.type_as(windows)).type_as(queries)


class SamplerLayer(InLLMLayer):
    """A sampler whose queries are the hidden states in an image's slots."""

    reads_slots = True

    def __init__(self, sampler: Sampler, num_sources: int, window: int) -> None:
        super().__init__()
        self.sampler, self.shape = sampler, (num_sources, window**2)

    def forward(self, hidden: Tensor, context: LayerContext) -> Tensor:
        if context.memory is None or context.token_of_slot is None:  # no image, or none in this step
            return hidden
        sources, length = self.shape
        seen = context.memory.unflatten(2, (-1, sources * length + 1))  # (batch, images, slots, window, dim)
        places = context.token_of_slot  # (batch, images, slots)
        index = places.clamp(min=0).flatten(1)[..., None].expand(-1, -1, hidden.shape[-1])
        queries = hidden.gather(1, index)
        windows = seen[..., :-1, :].flatten(0, 2).unflatten(1, (sources, length))
        updated = self.sampler(queries.flatten(0, 1)[:, None], windows, seen[..., -1:, :].flatten(0, 2))
        change = (updated.view_as(queries) - queries) * (places.flatten(1) >= 0)[..., None]
        return hidden.scatter_add(1, index, change.type_as(hidden))


@register("sva")
class SpatialVisionAggregator(Connector):
    """`side` x `side` tokens: each query attends to its own `window` x `window` patches of every encoder.

    A learned query, `depth` times, then an MLP; and the tokens' own hidden states again inside the LLM, `num_inside`
    times, the first behind decoder layer 0 and then behind every n-th (`every`). All encoders that stand side by side
    are read apart, each through an MLP of its own; beside its window a query sees the mean of the first one.

    Source: Tong et al., Cambrian-1 (2024), section 3.2, and its code (8B: 3 before, then every third layer).
    Differs: all encoders are resampled to one grid of `side` · `window`, where the source's have windows of their own;
    no newline behind the rows; inside the LLM as many samplers as it has layers for, at most `num_inside`.
    """

    def __init__(
        self,
        vision: VisionSpec,
        text: TextSpec,
        *,
        side: int = 24,
        window: int = 1,
        depth: int = 3,
        hidden_size: int = 1024,
        num_heads: int = 16,
        num_inside: int = 10,
        every: int = 3,
    ) -> None:
        super().__init__()
        at_least_one("sva", side=side, window=window, depth=depth, num_heads=num_heads, every=every)
        if hidden_size % num_heads:
            raise ValueError(f"connector 'sva': hidden_size {hidden_size} is no multiple of num_heads {num_heads}")
        self.side, self.window, self.widths = side, window, vision.widths or (vision.hidden_size,)
        sources = len(self.widths)
        self.projects = nn.ModuleList(
            nn.Sequential(
                FeedForward(width, hidden_size, "gelu", bias=True, out_dim=hidden_size), nn.LayerNorm(hidden_size)
            )
            for width in self.widths
        )
        self.query = nn.Parameter(torch.randn(hidden_size))
        shape = (hidden_size, sources, window, num_heads)
        self.samplers = nn.ModuleList(Sampler(hidden_size, *shape) for _ in range(depth))
        self.project = FeedForward(hidden_size, text.hidden_size, "gelu", bias=True, out_dim=text.hidden_size)
        places = range(1, text.num_layers + 1, every)[:num_inside]
        self.layers = nn.ModuleDict(
            {str(k): SamplerLayer(Sampler(text.hidden_size, *shape), sources, window) for k in places}
        )

    def num_tokens(self, image: ImageLayout) -> int:
        return self.side**2 * image.num_crops

    def output_grid(self, grid: Grid) -> Grid:
        return self.side, self.side

    def forward(self, visual: VisualInput) -> VisualTokens:
        (features,) = visual.maps
        seen = map_crops(visual, features.values, lambda patches, grid, budget: self._seen(patches, grid))
        # What each slot sees, (images, slots, (sources · window² + 1) · dim); that is the memory of the layers too.
        each = rearrange(seen.tokens, "images slots (length dim) -> (images slots) length dim", dim=len(self.query))
        windows = each[:, :-1].unflatten(1, (len(self.widths), -1))
        queries = self.query.expand(len(each), 1, -1).type_as(each)
        for sampler in self.samplers:
            queries = sampler(queries, windows, each[:, -1:])
        tokens = self.project(queries).view(*seen.mask.shape, -1)
        if not self.layers:
            return VisualTokens(tokens, seen.mask)
        memory = rearrange(each, "(images slots) length dim -> images (slots length) dim", images=len(tokens))
        return VisualTokens(tokens, seen.mask, memory, seen.mask.repeat_interleave(each.shape[1], 1))

    def _seen(self, patches: Tensor, grid: Grid) -> Tensor:
        """Windows of every encoder and the mean of the first, for each query, in one row of channels."""
        side = self.side * self.window
        windows, context = [], None
        for part, project in zip(patches.split(self.widths, -1), self.projects, strict=True):
            projected = project(part)
            if context is None:
                context = projected.mean(1, keepdim=True)
            image = to_map(projected, grid)
            if grid != (side, side):
                image = F.interpolate(image.float(), (side, side), mode="bilinear").type_as(image)
            windows.append(
                rearrange(
                    image,
                    "crops dim (height rows) (width columns) -> crops (height width) (rows columns) dim",
                    rows=self.window,
                    columns=self.window,
                )
            )
        assert context is not None
        seen = torch.cat([*windows, context[:, None].expand(-1, self.side**2, -1, -1)], 2)
        return seen.flatten(2)

    def llm_layers(self) -> Mapping[int, Sequence[InLLMLayer]]:
        return {int(place): [layer] for place, layer in self.layers.items() if isinstance(layer, InLLMLayer)}
