"""The contract of a connector: visual features in; tokens, a memory or layers inside the LLM out.

A prefix connector returns tokens for the image's slots in the LLM's input. An interleaved one returns a memory and
gives layers that attend to it inside the LLM. A hybrid does both, or adds to the hidden states of some layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar

import torch
from torch import LongTensor, Tensor, nn

from vlmzoo.registry import Registry

Grid = tuple[int, int]
"""(height, width) in patches or tokens."""

NORMED: Final = "last_hidden_state"
Layer = int | Literal["last_hidden_state"]
"""A hidden state of the encoder: an index (0: the embeddings, -1: the last layer), or the last one behind its norm."""


@dataclass(frozen=True)
class VisionSpec:
    """What a connector may know of the encoder."""

    hidden_size: int
    num_layers: int
    num_heads: int
    norm_eps: float
    patch_size: int
    has_cls: bool
    widths: tuple[int, ...] = ()  # of encoders that stand side by side, which add up to hidden_size; one: empty


@dataclass(frozen=True)
class TextSpec:
    """What a connector may know of the LLM."""

    hidden_size: int
    num_layers: int
    num_heads: int
    norm_eps: float
    intermediate_size: int
    vocab_size: int


@dataclass(frozen=True)
class FeatureRequest:
    """What a connector wants from the encoder; one `FeatureMap` a layer, in this order.

    layers: empty: the one that the run names.
    """

    layers: tuple[Layer, ...] = ()
    cls: bool = False
    cls_attention: bool = False
    instruction: bool = False


@dataclass(frozen=True)
class ImageLayout:
    """The geometry of one image, known before any weight is touched."""

    grids: tuple[Grid, ...]  # one a crop, in patches
    size: tuple[int, int] | None = None  # (height, width) of the original in pixels
    token_budget: int | None = None  # at most so many tokens, for connectors that can make fewer; None: all
    tiling: Grid | None = None  # rows and columns of crops that show the image; crops behind these are empty

    @property
    def num_crops(self) -> int:
        return len(self.grids)


@dataclass
class FeatureMap:
    """Patch features of one encoder layer for all crops of a batch, padded to the largest grid."""

    values: Tensor  # (crops, patches, vision_dim), row-major over the grid
    grids: tuple[Grid, ...]  # one a crop
    mask: Tensor  # (crops, patches), True where a patch is real
    cls: Tensor | None = None  # (crops, vision_dim)
    cls_attention: Tensor | None = None  # (crops, heads, patches)

    @staticmethod
    def dense(values: Tensor, grid: Grid, cls: Tensor | None = None, cls_attention: Tensor | None = None) -> FeatureMap:
        """A map whose crops all have the same grid.

        Raises:
            ValueError: the grid does not hold as many patches as there are.
        """
        if values.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"{values.shape[1]} patches do not fill a grid of {grid[0]} x {grid[1]}")
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        return FeatureMap(values, (grid,) * len(values), mask, cls, cls_attention)


@dataclass
class Instruction:
    """The human turn that holds each image's `<image>`, in the connector's own tokenizer."""

    input_ids: Tensor  # (images, length)
    mask: Tensor  # (images, length), True where a token is real


@dataclass
class VisualInput:
    """All images of a batch, as the encoder saw them."""

    maps: tuple[FeatureMap, ...]  # as `FeatureRequest.layers` asked
    image_of_crop: LongTensor | Tensor  # (crops,), ascending
    sample_of_image: LongTensor | Tensor  # (images,), ascending
    layouts: tuple[ImageLayout, ...]  # one an image
    instruction: Instruction | None = None

    @property
    def num_images(self) -> int:
        return len(self.layouts)


@dataclass
class VisualTokens:
    """What a connector makes of the images.

    tokens fill the image's slots in the LLM's input, the first `mask.sum()` of them; slots left over are masked.
    A memory is what in-LLM layers attend to. Additions are added to the slots' hidden states before decoder layer k.
    """

    tokens: Tensor  # (images, max_tokens, text_dim)
    mask: Tensor  # (images, max_tokens), True where a token is real; real ones come first
    memory: Tensor | None = None  # (images, memory_tokens, memory_dim)
    memory_mask: Tensor | None = None  # (images, memory_tokens)
    additions: Mapping[int, Tensor] = field(default_factory=dict)  # layer -> (images, max_tokens, text_dim)


@dataclass
class LayerContext:
    """What an in-LLM layer sees beside the hidden states. It belongs to one forward or one `generate` call.

    A layer keeps keys and values it computed from the memory in `cache` under itself; decoding reuses them.
    """

    memory: Tensor | None  # (batch, images, memory_tokens, memory_dim), padded; None: the whole batch has no image
    memory_mask: Tensor | None  # (batch, images, memory_tokens), True where real
    image_of_token: Tensor  # (batch, length), index of the last image at or before each token; -1: none
    cache: dict[nn.Module, tuple[Tensor, Tensor]] | None = None  # None: keep nothing (training)
    token_of_slot: Tensor | None = None  # (batch, images, slots), the token in each slot, -1: none; where it is read


class InLLMLayer(nn.Module, ABC):
    """A layer that runs inside an otherwise unmodified decoder."""

    reads_slots: bool = False  # whether it needs `LayerContext.token_of_slot`, which is None in steps without slots

    @abstractmethod
    def forward(self, hidden: Tensor, context: LayerContext) -> Tensor:
        """The hidden states (batch, length, text_dim) after this layer."""


class Connector(nn.Module, ABC):
    """What stands between the encoder and the LLM. The general contract; `TokenConnector` is the simple one."""

    requires: FeatureRequest = FeatureRequest()
    without_gradient: frozenset[str] = frozenset()
    """Names of parameters that the source does not train (a check shows that they get no gradient)."""

    @abstractmethod
    def num_tokens(self, image: ImageLayout) -> int:
        """How many slots (at least one) the image takes in the LLM's input: exact, or an upper bound."""

    def output_grid(self, grid: Grid) -> Grid | None:
        """The grid of the tokens of a crop; None: they have none."""
        return None

    def tiles(self, size: tuple[int, int], crop: Grid) -> Grid | None:
        """Rows and columns of tiles that follow the thumbnail of an image, as its further crops; None: it has none.

        Args:
            size: (height, width) of the original in pixels.
            crop: the grid of each crop in patches.
        """
        return None

    @abstractmethod
    def forward(self, visual: VisualInput) -> VisualTokens:
        """What all images of the batch become."""

    def llm_layers(self) -> Mapping[int, Sequence[InLLMLayer]]:
        """Layers to run before decoder layer k, 0 <= k <= number of layers (there: before the final norm)."""
        return {}


class TokenConnector(nn.Module, ABC):
    """A connector that maps the patches of one grid to tokens, and never sees padding, crops or samples."""

    requires: FeatureRequest = FeatureRequest()
    without_gradient: frozenset[str] = frozenset()

    @abstractmethod
    def num_tokens(self, grid: Grid) -> int:
        """How many tokens a crop with this grid becomes."""

    def output_grid(self, grid: Grid) -> Grid | None:
        return None

    @abstractmethod
    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        """(crops, patches, vision_dim) -> (crops, tokens, text_dim).

        Where it `requires` several layers, they stand side by side: (crops, patches, layers · vision_dim).
        """


class TokenConnectorAdapter(Connector):
    """A `TokenConnector` under the general contract: called once per distinct grid, crops joined per image."""

    def __init__(self, inner: TokenConnector) -> None:
        super().__init__()
        self.inner = inner
        self.requires = inner.requires
        self.without_gradient = frozenset(f"inner.{name}" for name in inner.without_gradient)

    def num_tokens(self, image: ImageLayout) -> int:
        return sum(self.inner.num_tokens(grid) for grid in image.grids)

    def output_grid(self, grid: Grid) -> Grid | None:
        return self.inner.output_grid(grid)

    def forward(self, visual: VisualInput) -> VisualTokens:
        return map_crops(visual, side_by_side(visual), lambda patches, grid, budget: self.inner(patches, grid))


connectors = Registry(
    "connector", bases=(TokenConnector, Connector), provided=("vision_dim", "text_dim", "vision", "text")
)

C = TypeVar("C", bound="type[Connector] | type[TokenConnector]")


def register(name: str) -> Callable[[C], C]:
    """A class decorator that makes a connector known under this name."""
    return connectors.register(name)


def pad_tokens(images: Sequence[Tensor]) -> VisualTokens:
    """Visual tokens of images with different counts, each (tokens, text_dim), padded with zeros and masked."""
    tokens = nn.utils.rnn.pad_sequence(list(images), batch_first=True)
    counts = torch.tensor([len(image) for image in images], device=tokens.device)
    mask = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
    return VisualTokens(tokens, mask)


def side_by_side(visual: VisualInput) -> Tensor:
    """The layers that were asked for, (crops, patches, layers · vision_dim)."""
    if len(visual.maps) == 1:
        return visual.maps[0].values
    return torch.cat([features.values for features in visual.maps], -1)


def map_crops(
    visual: VisualInput, values: Tensor, tokens_of: Callable[[Tensor, Grid, int | None], Tensor]
) -> VisualTokens:
    """The tokens of all crops, joined by image, from `values` (crops, patches, dim) of any layers.

    Args:
        tokens_of: makes tokens (crops, tokens, text_dim) of crops without padding that share a grid and a token
            budget; called once for each such pair.
    """
    budgets = [layout.token_budget for layout in visual.layouts]
    share = [
        (grid, None if budget is None else budget // layout.num_crops)
        for layout, budget in zip(visual.layouts, budgets, strict=True)
        for grid in layout.grids
    ]
    if len(set(share)) == 1 and len(share) == visual.num_images:
        tokens = tokens_of(values, *share[0])  # the common case needs no scatter
        return VisualTokens(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))
    crops: dict[int, Tensor] = {}
    for grid, budget in dict.fromkeys(share):
        rows = [row for row, other in enumerate(share) if other == (grid, budget)]
        tokens = tokens_of(values[rows, : grid[0] * grid[1]], grid, budget)
        crops.update(zip(rows, tokens, strict=True))
    images, first = [], 0
    for layout in visual.layouts:
        images.append(torch.cat([crops[crop] for crop in range(first, first + layout.num_crops)]))
        first += layout.num_crops
    return pad_tokens(images)
