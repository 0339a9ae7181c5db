"""Connectors that keep every promise, one of each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmzoo.connector import (
    Connector,
    FeatureRequest,
    ImageLayout,
    InLLMLayer,
    LayerContext,
    TextSpec,
    TokenConnector,
    VisionSpec,
    VisualInput,
    VisualTokens,
)


class Strided(TokenConnector):
    """Every `stride`-th patch, projected."""

    def __init__(self, vision_dim: int, text_dim: int, *, stride: int = 2):
        super().__init__()
        self.stride, self.project = stride, nn.Linear(vision_dim, text_dim)

    def num_tokens(self, grid):
        return -(-grid[0] * grid[1] // self.stride)

    def forward(self, patches, grid):
        return self.project(patches[:, :: self.stride])


class Merged(TokenConnector):
    """2 x 2 patches a token; grids with an odd side are refused."""

    def __init__(self, vision_dim: int, text_dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.project = nn.Linear(4 * vision_dim, text_dim)
        self.dropout = nn.Dropout(dropout)

    def num_tokens(self, grid: tuple[int, int]) -> int:
        if grid[0] % 2 or grid[1] % 2:
            raise ValueError(f"a grid of {grid} does not split into 2 x 2 patches")
        return grid[0] * grid[1] // 4

    def output_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        return grid[0] // 2, grid[1] // 2

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        rows, columns = self.output_grid(grid)
        tiles = patches.unflatten(1, (rows, 2, columns, 2)).transpose(2, 3).flatten(3, 5).flatten(1, 2)
        return self.dropout(self.project(tiles))


class Pooled(Connector):
    """One token an image: the mean of its patches and CLS in two layers, and of its instruction."""

    requires = FeatureRequest(layers=(-2, 12), cls=True, instruction=True)

    def __init__(self, vision_dim: int, text_dim: int, text: TextSpec) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(2 * vision_dim, text_dim) for _ in self.requires.layers)
        self.words = nn.Embedding(text.vocab_size, text_dim)

    def num_tokens(self, image: ImageLayout) -> int:
        return 1

    def forward(self, visual: VisualInput) -> VisualTokens:
        assert visual.instruction is not None
        mask = visual.instruction.mask[..., None]
        total = (self.words(visual.instruction.input_ids) * mask).sum(1) / mask.sum(1)
        for project, features in zip(self.project, visual.maps, strict=True):
            assert features.cls is not None
            means = torch.cat([_mean(features.values, features.mask[..., None]), features.cls], 1)
            total = total.index_add(0, visual.image_of_crop, project(means))
        return VisualTokens(total[:, None], torch.ones_like(total[:, :1], dtype=torch.bool))


class Sparse(Connector):
    """Four slots an image: the first is always filled, of the others those whose patch has a positive first value.

    Each token adds the mean of the image's crops to its patch.
    """

    requires = FeatureRequest()

    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(vision_dim, text_dim)

    def num_tokens(self, image: ImageLayout) -> int:
        return 4

    def forward(self, visual: VisualInput) -> VisualTokens:
        starts = torch.tensor([sum(len(one.grids) for one in visual.layouts[:i]) for i in range(visual.num_images)])
        patches = visual.maps[0].values[starts.to(visual.image_of_crop.device), :4]
        keep = patches[..., 0] > 0
        first = torch.arange(4, device=keep.device)
        order = torch.where(keep | (first == 0), first, first + 4).argsort(1)
        mask = first < (keep | (first == 0)).sum(1, keepdim=True)
        means = _mean(visual.maps[0].values, visual.maps[0].mask[..., None])
        image = patches.new_zeros(patches[:, 0].shape).index_add(0, visual.image_of_crop, means)
        tokens = self.project(patches.gather(1, order[..., None].expand_as(patches)) + image[:, None])
        return VisualTokens(tokens, mask, additions={0: tokens * 0.5, 3: tokens * 0.25})


class Reader(InLLMLayer):
    """Adds, behind a tanh gate, a projection of the mean of the image that each token sees."""

    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.project = nn.Linear(vision_dim, text_dim)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, context: LayerContext) -> Tensor:
        if context.memory is None or context.memory_mask is None:
            return hidden
        if self.gradient_checkpointing and self.training:
            return checkpoint(self.read, hidden, context, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return self.read(hidden, context)

    def read(self, hidden: Tensor, context: LayerContext) -> Tensor:
        means = self.means(context)
        index = context.image_of_token.clamp(min=0)[..., None].expand(-1, -1, means.shape[-1])
        seen = means.gather(1, index) * (context.image_of_token >= 0)[..., None]
        return hidden + self.gate.tanh() * seen

    def means(self, context: LayerContext) -> Tensor:
        """(batch, images, text_dim)"""
        assert context.memory is not None
        assert context.memory_mask is not None
        return self.project(_mean(context.memory, context.memory_mask[..., None]))


class Interleaved(Connector):
    """A marker in one slot an image, its patches as memory, and layers that read it inside the LLM."""

    reader = Reader

    def __init__(self, vision: VisionSpec, text: TextSpec) -> None:
        super().__init__()
        self.marker = nn.Parameter(torch.randn(text.hidden_size))
        self.layers = nn.ModuleDict(
            {str(layer): self.reader(vision.hidden_size, text.hidden_size) for layer in (1, text.num_layers)}
        )

    def num_tokens(self, image: ImageLayout) -> int:
        return 1

    def forward(self, visual: VisualInput) -> VisualTokens:
        features = visual.maps[0]
        crops = [layout.num_crops for layout in visual.layouts]
        memory, mask = (
            nn.utils.rnn.pad_sequence([image.flatten(0, 1) for image in tensor.split(crops)], batch_first=True)
            for tensor in (features.values, features.mask)
        )
        tokens = self.marker.expand(visual.num_images, 1, -1)
        return VisualTokens(tokens, mask.new_ones(tokens.shape[:2]), memory, mask)

    def llm_layers(self) -> Mapping[int, Sequence[InLLMLayer]]:
        return {int(layer): [reader] for layer, reader in self.layers.items() if isinstance(reader, InLLMLayer)}


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0).sum(-2) / mask.sum(-2).clamp(min=1)
