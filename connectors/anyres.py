"""Images of any resolution: a thumbnail and tiles, each through another connector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlmzoo.connector import (
    Connector,
    Grid,
    ImageLayout,
    Instruction,
    TextSpec,
    TokenConnector,
    TokenConnectorAdapter,
    VisionSpec,
    VisualInput,
    VisualTokens,
    connectors,
    register,
)
from vlmzoo.connectors._layers import at_least_one

PINPOINTS: tuple[Grid, ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""LLaVA-NeXT's, in tiles."""


def best_pinpoint(pinpoints: Sequence[Grid], tile: tuple[int, int], size: tuple[int, int]) -> Grid:
    """The rows and columns of tiles that keep most pixels of an image, and of these waste fewest; the first of several.

    Args:
        tile, size: (height, width) in pixels, of a tile and of the image.
    """

    def pixels(grid: Grid) -> tuple[int, int]:
        height, width = grid[0] * tile[0], grid[1] * tile[1]
        scale = min(width / size[1], height / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - height * width

    return max(pinpoints, key=pixels)


def padding(grid: Grid, patches: Grid, size: tuple[int, int]) -> Grid:
    """Rows above and below, columns left and right, that a centred image of this size (height, width) leaves of a grid.

    Args:
        grid: of the tokens that stand for so many `patches`.
    """
    (rows, columns), (height, width) = grid, size
    if width / height > patches[1] / patches[0]:
        shown = height * (patches[1] / width) * (rows / patches[0])
        return (rows - int(round(shown, 7))) // 2, 0
    shown = width * (patches[0] / height) * (columns / patches[1])
    return 0, (columns - int(round(shown, 7))) // 2


@dataclass(frozen=True)
class Mosaic:
    """How the tokens of an image's tiles become the rows of one picture."""

    tile: Grid  # of tokens
    tiles: Grid  # rows and columns of tiles
    padding: Grid  # rows of tokens cut off above and below, columns left and right
    tokens: Grid  # rows and columns that are left, after downscaling

    def picture(self, tiles: Tensor, newline: Tensor) -> Tensor:
        """(tokens, dim) from tiles (tiles, tokens, dim) and what ends a row (1, dim)."""
        picture = rearrange(
            tiles,
            "(rows columns) (height width) dim -> dim (rows height) (columns width)",
            rows=self.tiles[0],
            height=self.tile[0],
        )
        above, left = self.padding
        picture = picture[:, above : picture.shape[1] - above, left : picture.shape[2] - left]
        if picture.shape[1:] != self.tokens:
            picture = F.interpolate(picture[None], self.tokens, mode="bilinear")[0]
        ends = newline.T[:, None].expand(-1, picture.shape[1], -1)
        return torch.cat([picture, ends], 2).flatten(1).T


@register("anyres")
class AnyResolution(Connector):
    """The tokens of a thumbnail, then those of tiles as the rows of one picture, each row ended by a learned newline.

    Another connector, made with its `options`, sees each crop as an image of its own. Where its tokens have a grid, the
    tiles' grids are joined, what only shows padding is cut off, and with `max_tiles` a picture of more than 1.1² times
    as many tokens as so many tiles have is scaled down, bilinearly. An image of one crop is a thumbnail and a newline.

    Source: Liu et al., LLaVA-NeXT (2024), "Dynamic High Resolution"; `max_tiles`: Li et al., LLaVA-OneVision (2024),
    section 3.2, Higher AnyRes.
    Differs: tokens without a grid, which the source does not have, are joined crop by crop, with one newline behind.

    Args:
        grid_pinpoints: rows and columns of tiles that images may be cut into.
        tile_size: pixels a side of a crop; None: its patches' own.

    Raises:
        ValueError: no pinpoint, an unknown connector, or one that has layers inside the LLM.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        vision: VisionSpec,
        text: TextSpec,
        *,
        connector: str = "mlp",
        options: Mapping[str, Any] | None = None,
        grid_pinpoints: tuple[Grid, ...] = PINPOINTS,
        max_tiles: int | None = None,
        tile_size: int | None = None,
    ) -> None:
        super().__init__()
        if not grid_pinpoints or any(len(grid) != 2 for grid in grid_pinpoints):
            raise ValueError(f"connector 'anyres': expected (rows, columns) in grid_pinpoints, got {grid_pinpoints}")
        at_least_one(
            "anyres",
            grid_pinpoints=min(map(min, grid_pinpoints)),
            max_tiles=1 if max_tiles is None else max_tiles,
            tile_size=1 if tile_size is None else tile_size,
        )
        provided = {"vision_dim": vision_dim, "text_dim": text_dim, "vision": vision, "text": text}
        part = connectors.create(connector, options or {}, provided)
        self.inner: Connector = TokenConnectorAdapter(part) if isinstance(part, TokenConnector) else part
        if self.inner.llm_layers():
            raise ValueError(f"connector 'anyres': {connector!r} has layers inside the LLM, expected tokens alone")
        self.requires = self.inner.requires
        self.without_gradient = frozenset(f"inner.{name}" for name in self.inner.without_gradient)
        self.pinpoints = tuple((rows, columns) for rows, columns in grid_pinpoints)
        self.max_tiles, self.tile_size, self.patch_size = max_tiles, tile_size, vision.patch_size
        self.newline = nn.Parameter(torch.randn(text_dim) / text_dim**0.5)

    @staticmethod
    def resolved(options: dict[str, Any]) -> dict[str, Any]:
        """With the inner connector's options written out."""
        return {**options, "options": connectors.resolve(options["connector"], options["options"] or {})}

    def tiles(self, size: tuple[int, int], crop: Grid) -> Grid:
        side = self.tile_size
        tile = (side, side) if side else (crop[0] * self.patch_size, crop[1] * self.patch_size)
        return best_pinpoint(self.pinpoints, tile, size)

    def num_tokens(self, image: ImageLayout) -> int:
        crops = [self.inner.num_tokens(crop) for crop in self._crops(image)]
        mosaic = self._mosaic(image)
        if mosaic is None:
            return sum(crops) + 1
        rows, columns = mosaic.tokens
        return crops[0] + rows * (columns + 1)

    def forward(self, visual: VisualInput) -> VisualTokens:
        found = self.inner(self._crops_alone(visual))
        width = len(self.newline)
        values = torch.cat([found.tokens, *found.additions.values()], -1)
        newline = F.pad(self.newline, (0, values.shape[-1] - width)).to(values)[None]  # nothing is added to it
        images, masks, first = [], [], 0
        for layout in visual.layouts:
            crops = slice(first, first := first + layout.num_crops)
            slots = [self.inner.num_tokens(crop) for crop in self._crops(layout)]
            tokens = [crop[:count] for crop, count in zip(values[crops], slots, strict=True)]
            mask = [crop[:count] for crop, count in zip(found.mask[crops], slots, strict=True)]
            mosaic = self._mosaic(layout)
            if mosaic is None:
                tokens, mask = [*tokens, newline], [*mask, mask[0].new_ones(1)]
            else:
                picture = mosaic.picture(torch.stack(tokens[1:]), newline)
                tokens, mask = [tokens[0], picture], [mask[0], mask[0].new_ones(len(picture))]
            images.append(torch.cat(tokens))
            masks.append(torch.cat(mask))
        tokens, mask = (nn.utils.rnn.pad_sequence(parts, batch_first=True) for parts in (images, masks))
        order = (~mask).int().argsort(dim=1, stable=True)  # a connector may leave slots of a crop empty
        tokens, mask = tokens.gather(1, order[..., None].expand_as(tokens)), mask.gather(1, order)
        tokens, *additions = tokens.split(width, -1)
        return VisualTokens(tokens, mask, additions=dict(zip(found.additions, additions, strict=True)))

    def _crops(self, image: ImageLayout) -> list[ImageLayout]:
        """Each crop as an image of its own, with its share of the token budget."""
        budget = None if image.token_budget is None else (image.token_budget - 1) // image.num_crops
        return [ImageLayout((grid,), token_budget=budget) for grid in image.grids]

    def _crops_alone(self, visual: VisualInput) -> VisualInput:
        image, instruction = visual.image_of_crop, visual.instruction
        if instruction is not None:
            instruction = Instruction(instruction.input_ids[image], instruction.mask[image])
        return replace(
            visual,
            image_of_crop=torch.arange(len(image), device=image.device),
            sample_of_image=visual.sample_of_image[image],
            layouts=tuple(crop for layout in visual.layouts for crop in self._crops(layout)),
            instruction=instruction,
        )

    def _mosaic(self, image: ImageLayout) -> Mosaic | None:
        """None: the tokens of the crops are joined one behind the other.

        Raises:
            ValueError: several crops that are not a thumbnail and the tiles of an image of this size.
        """
        if image.num_crops == 1 or (grid := self.inner.output_grid(image.grids[0])) is None:
            return None
        if image.size is None:
            raise ValueError(f"connector 'anyres': {image.num_crops} crops of an image whose size is not known")
        rows, columns = self.tiles(image.size, image.grids[0])
        if image.grids != image.grids[:1] * (1 + rows * columns):
            height, width = image.size
            raise ValueError(
                f"connector 'anyres': an image of {height} x {width} pixels has crops of {list(image.grids)} patches, "
                f"expected a thumbnail and {rows} x {columns} tiles of one size"
            )
        whole = rows * grid[0], columns * grid[1]
        above, left = padding(whole, (rows * image.grids[0][0], columns * image.grids[0][1]), image.size)
        height, width = whole[0] - 2 * above, whole[1] - 2 * left
        if self.max_tiles is not None:
            ratio = math.sqrt(height * width / (self.max_tiles * grid[0] * grid[1]))
            if ratio > 1.1:
                height, width = max(1, int(height // ratio)), max(1, int(width // ratio))
        return Mosaic(grid, (rows, columns), (above, left), (height, width))
