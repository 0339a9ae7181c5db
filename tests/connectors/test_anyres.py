"""Tiles against LLaVA-NeXT and LLaVA-OneVision in transformers, and against them with a fault in ours."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, unpad_image
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from tests.connectors.parts import TEXT, VISION, create, distance, rescale, visual_input
from vlmzoo.connector import Grid, ImageLayout, VisualInput, connectors
from vlmzoo.connectors import anyres
from vlmzoo.connectors.anyres import PINPOINTS, AnyResolution, Mosaic, best_pinpoint, padding

Size = tuple[int, int]
ONEVISION = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))
CROP = (4, 4)
SIDE = CROP[0] * VISION.patch_size
EXTREMES = [(1, 1), (5, 900), (900, 5), (56, 112), (112, 112), (343, 392), (392, 343), (47, 188)]
"""The last three are a whole number of tokens wide or high, but for an error of their division."""


def sizes(count: int, seed: int = 0, longest: int = 1500) -> list[Size]:
    draw = random.Random(seed)
    return [(draw.randint(1, longest), draw.randint(1, longest)) for _ in range(count)]


@pytest.mark.parametrize("pinpoints", [PINPOINTS, ONEVISION, ((2, 2), (1, 1))])
@pytest.mark.parametrize("side", [24, 336, 384])
def test_the_best_pinpoint_is_transformers(pinpoints: Sequence[Grid], side: int) -> None:
    pixels = [(rows * side, columns * side) for rows, columns in pinpoints]
    for size in [*sizes(400), *pixels, (side, side), (1, 1), (1, 1500), (1500, 1)]:
        rows, columns = best_pinpoint(pinpoints, (side, side), size)
        assert (rows * side, columns * side) == select_best_resolution(size, pixels), size


def test_the_padding_is_transformers() -> None:
    for grid in [(4, 8), (8, 8), (12, 4), (27, 81), (48, 24), (72, 24)]:
        picture = torch.arange(grid[0] * grid[1]).view(1, *grid)
        for size in [*sizes(300), *sizes(300, seed=1, longest=100)]:
            above, left = padding(grid, grid, size)
            found = picture[:, above : grid[0] - above, left : grid[1] - left]
            assert torch.equal(found, unpad_image(picture, size)), (grid, size)


def made(pinpoints: Sequence[Grid] = PINPOINTS, max_tiles: int | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    ours = create("anyres", {"grid_pinpoints": pinpoints, "max_tiles": max_tiles, **options}).eval()
    rescale(ours)
    return ours


def tiled(ours: AnyResolution, originals: Sequence[Size], crop: Grid = CROP) -> VisualInput:
    """Random crops of images of these sizes."""
    tiles = [ours.tiles(size, crop) for size in originals]
    crops = [1 + rows * columns for rows, columns in tiles]
    generator = torch.Generator().manual_seed(2)
    patches = torch.randn(sum(crops), crop[0] * crop[1], VISION.hidden_size, generator=generator)
    visual = visual_input(patches, [crop] * sum(crops), crops)
    visual.layouts = tuple(ImageLayout((crop,) * count, size) for count, size in zip(crops, originals, strict=True))
    return visual


def packed(honest: Any, visual: VisualInput) -> list[Tensor]:
    """transformers' tokens (tokens, text_dim) of each image, with the projection and the newline of ours."""
    tile = {"image_size": SIDE, "patch_size": VISION.patch_size}
    pinpoints = [[rows * SIDE, columns * SIDE] for rows, columns in honest.pinpoints]
    config = SimpleNamespace(vision_config=SimpleNamespace(**tile), image_grid_pinpoints=pinpoints)
    model: Any = SimpleNamespace(config=config)
    crops = [layout.num_crops for layout in visual.layouts]
    features = honest.inner.inner(visual.maps[0].values, CROP).split(crops)
    shapes = [layout.size for layout in visual.layouts]
    if honest.max_tiles is None:
        found, _ = LlavaNextModel.pack_image_features(model, features, shapes, "full", honest.newline)
    else:
        ratio = f"anyres_max_{honest.max_tiles}"
        found, _ = LlavaOnevisionModel.pack_image_features(model, features, shapes, honest.newline, ratio)
    return found


def difference(ours: Any, honest: Any, originals: Sequence[Size]) -> float:
    """The largest of all images; infinite where one has another number of tokens."""
    visual = tiled(honest, originals)
    expected, found = packed(honest, visual), ours(visual)
    if found.mask.sum(1).tolist() != [len(tokens) for tokens in expected]:
        return float("inf")
    return max(distance(found.tokens[image][: len(tokens)], tokens) for image, tokens in enumerate(expected))


@pytest.mark.parametrize(
    ("pinpoints", "max_tiles"), [(PINPOINTS, None), (ONEVISION, 9), (ONEVISION, 1), (PINPOINTS, 2), (ONEVISION, None)]
)
def test_equals_transformers(pinpoints: Sequence[Grid], max_tiles: int | None) -> None:
    ours = made(pinpoints, max_tiles)
    for start in range(0, 100, 20):
        originals = [*sizes(20, seed=start, longest=600), *EXTREMES]
        if max_tiles is not None:  # it asks for a picture of no rows there
            originals = [size for size in originals if max(size) < 30 * min(size)]
        assert difference(ours, ours, originals) <= 1e-6
        visual = tiled(ours, originals)
        assert [ours.num_tokens(layout) for layout in visual.layouts] == [
            len(tokens) for tokens in packed(ours, visual)
        ]


def test_the_number_of_tokens_is_that_of_llava_onevision() -> None:
    with torch.device("meta"):
        torch.manual_seed(0)
    ours = create("anyres", {"grid_pinpoints": ONEVISION, "max_tiles": 9, "tile_size": 384})
    grid = (27, 27)

    def count(*size: int) -> int:
        rows, columns = ours.tiles(size, grid)
        return ours.num_tokens(ImageLayout((grid,) * (1 + rows * columns), size))

    assert count(384, 384) == 729 + 27 * 28
    assert count(1152, 1152) == 729 + 81 * 82
    assert count(2304, 2304) == 729 + 81 * 82


Fault = Callable[[Any, pytest.MonkeyPatch], None]


def of_picture(change: Callable[[Callable[..., Tensor], Mosaic, Tensor, Tensor], Tensor]) -> Fault:
    """Another way from tiles to a picture."""

    def fault(ours: Any, patch: pytest.MonkeyPatch) -> None:
        honest = Mosaic.picture
        patch.setattr(Mosaic, "picture", lambda self, tiles, newline: change(honest, self, tiles, newline))

    return fault


def by_columns(honest: Callable[..., Tensor], mosaic: Mosaic, tiles: Tensor, newline: Tensor) -> Tensor:
    rows, columns = mosaic.tiles
    turned = tiles.unflatten(0, (columns, rows)).transpose(0, 1).flatten(0, 1)
    return honest(mosaic, turned, newline)


def newline_first(honest: Callable[..., Tensor], mosaic: Mosaic, tiles: Tensor, newline: Tensor) -> Tensor:
    picture = honest(mosaic, tiles, newline).unflatten(0, (mosaic.tokens[0], -1))
    return picture.roll(1, 1).flatten(0, 1)


def without_newline(honest: Callable[..., Tensor], mosaic: Mosaic, tiles: Tensor, newline: Tensor) -> Tensor:
    return honest(mosaic, tiles, torch.zeros_like(newline))


def of_padding(change: Callable[[Grid, Grid, Size], Grid]) -> Fault:
    def fault(ours: Any, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(anyres, "padding", change)

    return fault


def without_rounding(grid: Grid, patches: Grid, size: Size) -> Grid:
    (rows, columns), (height, width) = grid, size
    if width / height > columns / rows:
        return (rows - int(height * (columns / width))) // 2, 0
    return 0, (columns - int(width * (rows / height))) // 2


def one_row_more(grid: Grid, patches: Grid, size: Size) -> Grid:
    above, left = padding(grid, patches, size)
    return max(0, above - 1), max(0, left - 1)


def thumbnail_last(ours: Any, patch: pytest.MonkeyPatch) -> None:
    honest = ours.forward

    def forward(visual: VisualInput) -> Any:
        found = honest(visual)
        count = CROP[0] * CROP[1]
        for image, length in enumerate(found.mask.sum(1).tolist()):
            found.tokens[image, :length] = found.tokens[image, :length].roll(-count, 0)
        return found

    ours.forward = forward


def interpolated(**options: Any) -> Fault:
    def fault(ours: Any, patch: pytest.MonkeyPatch) -> None:
        honest = F.interpolate
        functional = SimpleNamespace(
            interpolate=lambda features, size, mode: honest(features, size, **{"mode": mode, **options}), pad=F.pad
        )
        patch.setattr(anyres, "F", functional)

    return fault


def changed(name: str, value: Any) -> Fault:
    return lambda ours, patch: setattr(ours, name, value)


FAULTS: list[tuple[int | None, Fault]] = [
    (None, of_picture(by_columns)),
    (None, of_picture(newline_first)),
    (None, of_picture(without_newline)),
    (None, of_padding(lambda grid, patches, size: (0, 0))),
    (None, of_padding(lambda grid, patches, size: padding(grid, patches, size[::-1]))),
    (None, of_padding(without_rounding)),
    (None, of_padding(one_row_more)),
    (None, thumbnail_last),
    (None, changed("max_tiles", 2)),
    (2, changed("max_tiles", None)),
    (2, changed("max_tiles", 1)),
    (2, interpolated(mode="nearest")),
    (2, interpolated(mode="bicubic")),
    (2, interpolated(align_corners=True)),
    (2, interpolated(antialias=True)),
    (2, of_picture(newline_first)),
]


@pytest.mark.parametrize(("max_tiles", "fault"), FAULTS)
def test_the_comparison_sees(max_tiles: int | None, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, honest = made(max_tiles=max_tiles), made(max_tiles=max_tiles)
    originals = [(100, 230), (230, 100), (300, 290), (300, 100), *EXTREMES[-3:]]
    assert difference(ours, honest, originals) <= 1e-6
    fault(ours, monkeypatch)
    with torch.no_grad():
        assert difference(ours, honest, originals) > 1e-3


def test_one_crop_is_a_thumbnail_and_a_newline() -> None:
    ours = made()
    visual = visual_input(torch.randn(2, 16, VISION.hidden_size), [CROP, CROP])
    found = ours(visual)
    assert [ours.num_tokens(layout) for layout in visual.layouts] == found.mask.sum(1).tolist() == [17, 17]
    assert torch.equal(found.tokens[:, :16], ours.inner(visual).tokens)
    assert torch.equal(found.tokens[:, 16], ours.newline.expand(2, -1))


def test_a_token_may_be_wider_than_high() -> None:
    ours = made(connector="minigpt_v2", options={"group": 2})
    assert ours.inner.output_grid(CROP) == (4, 2)
    for size, tokens in (((56, 112), (4, 4)), ((112, 112), (8, 4)), ((60, 168), (4, 6)), ((112, 60), (8, 2))):
        visual = tiled(ours, [size])
        assert ours.num_tokens(visual.layouts[0]) == 8 + tokens[0] * (tokens[1] + 1)


def test_a_smaller_grid_of_tokens_is_stitched_too() -> None:
    ours, plain = made(connector="internvl"), made()
    size = (100, 240)
    visual = tiled(ours, [size])
    rows, columns = ours.tiles(size, CROP)
    above, left = padding((2 * rows, 2 * columns), (4 * rows, 4 * columns), size)
    count = 4 + (2 * rows - 2 * above) * (2 * columns - 2 * left + 1)
    assert ours(visual).tokens.shape == (1, count, TEXT.hidden_size)
    assert ours.num_tokens(visual.layouts[0]) == count < plain.num_tokens(visual.layouts[0])


@pytest.mark.parametrize(
    ("connector", "options"),
    [
        ("perceiver", {"num_latents": 5, "num_layers": 1, "num_heads": 2, "head_dim": 8}),
        ("attention_pooling", {"num_queries": 5, "num_heads": 2}),
        ("matryoshka", {"sides": (2, 1)}),
    ],
)
def test_tokens_without_a_grid_are_joined_crop_by_crop(connector: str, options: dict[str, Any]) -> None:
    ours = made(connector=connector, options=options)
    visual = tiled(ours, [(100, 230), (100, 100)])
    found, first = ours(visual), 0
    for image, layout in enumerate(visual.layouts):
        crops = visual.maps[0].values[first : (first := first + layout.num_crops)]
        alone = ours.inner(visual_input(crops, layout.grids)).tokens
        expected = torch.cat([alone.flatten(0, 1), ours.newline[None]])
        assert len(expected) == ours.num_tokens(layout) == found.mask[image].sum()
        assert distance(found.tokens[image][found.mask[image]], expected) <= 1e-6


def test_a_budget_is_shared_by_the_crops() -> None:
    ours = made(connector="matryoshka", options={"sides": (4, 2, 1)})
    visual = tiled(ours, [(100, 230)])
    (layout,) = visual.layouts
    for budget, count in ((layout.num_crops * 4 + 1, 4), (layout.num_crops * 4, 1)):
        visual.layouts = (ImageLayout(layout.grids, layout.size, budget),)
        assert ours.num_tokens(visual.layouts[0]) == layout.num_crops * count + 1 <= budget
        assert ours(visual).mask.sum() == layout.num_crops * count + 1


def test_slots_that_crops_leave_empty_come_last() -> None:
    torch.manual_seed(0)
    ours = made(connector="prumerge", options={"num_neighbours": 3})
    visual = tiled(ours, [(100, 230), (100, 100)])
    visual.maps[0].cls_attention = torch.rand(len(visual.image_of_crop), 1, 16) ** 4
    found = ours(visual)
    kept = found.mask.sum(1)
    assert (kept < torch.tensor([ours.num_tokens(layout) for layout in visual.layouts])).all()
    for image, count in enumerate(kept.tolist()):
        assert found.mask[image, :count].all()
        assert torch.equal(found.tokens[image, count - 1], ours.newline)


def test_what_is_added_inside_the_llm_stands_at_its_tokens() -> None:
    ours = made(connector="deepstack", options={"layers": (1, 2), "last_layer": 3})
    visual = tiled(ours, [(100, 230), (300, 290)])
    first = visual.maps[0]
    visual.maps = (first, first, first)
    ours.newline.data.fill_(7.0)
    with torch.no_grad():
        found = ours(visual)
    assert set(found.additions) == {1, 2}
    ends = (found.tokens == 7.0).all(-1)
    assert ends.sum() == sum(ours._mosaic(layout).tokens[0] for layout in visual.layouts)
    for layer, values in found.additions.items():
        assert values.shape == found.tokens.shape
        assert not values[ends].any()
        assert values[found.mask & ~ends].all(-1).all(), layer


def test_crops_that_are_no_thumbnail_and_tiles_are_refused() -> None:
    ours = made()
    with pytest.raises(ValueError, match="3 crops of an image whose size is not known"):
        ours.num_tokens(ImageLayout((CROP,) * 3))
    message = r"100 x 230 pixels has crops of \[\(4, 4\), \(4, 4\)\] patches, expected a thumbnail and 1 x 3 tiles"
    with pytest.raises(ValueError, match=message):
        ours.num_tokens(ImageLayout((CROP,) * 2, (100, 230)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"connector": "gated_cross_attention"}, "'gated_cross_attention' has layers inside the LLM"),
        ({"connector": "mlpp"}, "unknown connector 'mlpp'; did you mean 'mlp'"),
        ({"options": {"deep": 2}}, "unknown option of connector 'mlp': 'deep'"),
        ({"grid_pinpoints": ()}, r"expected \(rows, columns\) in grid_pinpoints, got \(\)"),
        ({"grid_pinpoints": ((1, 0),)}, "grid_pinpoints must be at least 1, got 0"),
        ({"max_tiles": 0}, "max_tiles must be at least 1, got 0"),
    ],
)
def test_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("anyres", options)


def test_the_inner_options_are_written_out() -> None:
    resolved = connectors.resolve("anyres", {"connector": "perceiver", "options": {"num_latents": 9}})
    assert resolved["options"] == connectors.resolve("perceiver", {"num_latents": 9})
    assert connectors.resolve("anyres", resolved) == resolved
    with pytest.raises(ValueError, match="unknown option of connector 'perceiver': 'num_latent'; did you mean"):
        connectors.resolve("anyres", {"connector": "perceiver", "options": {"num_latent": 9}})
