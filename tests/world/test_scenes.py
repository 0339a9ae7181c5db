import random
from dataclasses import replace

import numpy as np
import pytest

from vlmzoo.world.scenes import CELL, COLORS, SHAPES, SIZES, Scene, SceneObject, alter, draw, sample_scene


def scenes(num_scenes: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(num_scenes)]


def test_seed_decides_scenes_and_pixels() -> None:
    assert scenes(20) == scenes(20)
    assert scenes(20) != scenes(20, seed=1)
    for scene in scenes(20):
        assert np.array_equal(draw(scene), draw(scene))
        assert not np.array_equal(draw(scene), draw(replace(scene, seed=scene.seed + 1)))


def test_picture_is_an_rgb_image_of_72_pixels() -> None:
    image = draw(scenes(1)[0])
    assert image.shape == (72, 72, 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize("cell", range(9))
def test_each_named_attribute_changes_its_cell_and_no_other(cell: int) -> None:
    """Same seed, one attribute changed: the difference lies in the object's cell and is plainly visible."""
    item = SceneObject(cell, "large", "red", "circle")
    base = draw(Scene((item,), seed=5)).astype(int)
    changes = [replace(item, size="small")]
    changes += [replace(item, color=color) for color in COLORS if color != "red"]
    changes += [replace(item, shape=shape) for shape in SHAPES if shape != "circle"]
    for changed in changes:
        difference = abs(draw(Scene((changed,), seed=5)).astype(int) - base).max(axis=2)
        rows, columns = np.nonzero(difference)
        assert (difference > 60).sum() >= 12
        assert set(rows // CELL * 3 + columns // CELL) == {cell}


def test_scenes_are_well_formed_and_varied() -> None:
    drawn = scenes(2000)
    assert {len(scene.objects) for scene in drawn} == {1, 2, 3, 4}
    assert len({scene.key for scene in drawn}) > 1900
    for scene in drawn:
        cells = [item.cell for item in scene.objects]
        assert cells == sorted(set(cells))
        assert len({(item.color, item.shape) for item in scene.objects}) == len(scene.objects)
    items = [item for scene in drawn for item in scene.objects]
    assert {(item.cell, item.size) for item in items} == {(cell, size) for cell in range(9) for size in SIZES}


def test_split_ignores_the_seed_and_keeps_an_eighth() -> None:
    rng = random.Random(0)
    assert all(sample_scene(rng, "evaluation").split == "evaluation" for _ in range(50))
    for scene in scenes(50):
        assert scene.split == "training" == replace(scene, seed=1).split
    single = [
        Scene((SceneObject(cell, size, color, shape),))
        for cell in range(9)
        for size in SIZES
        for color in COLORS
        for shape in SHAPES
    ]
    share = sum(scene.split == "evaluation" for scene in single) / len(single)
    assert 0.08 < share < 0.17


def test_altered_scene_differs_in_one_attribute_of_one_object() -> None:
    rng = random.Random(0)
    for scene in scenes(200):
        twin = alter(scene, rng)
        assert len(twin.objects) == len(scene.objects)
        gone, come = set(scene.objects) - set(twin.objects), set(twin.objects) - set(scene.objects)
        (before,), (after,) = gone, come
        same = [getattr(before, name) == getattr(after, name) for name in ("cell", "size", "color", "shape")]
        assert same.count(False) == 1
        assert len({(item.color, item.shape) for item in twin.objects}) == len(twin.objects)
