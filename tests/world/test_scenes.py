import random
from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from vlmzoo.world.scenes import (
    CELL,
    COLORS,
    COMMON,
    RARE,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    Split,
    alter,
    digits_of,
    draw,
    sample_scene,
)

SPLITS: tuple[Split, ...] = ("training", "validation", "evaluation")


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
        for color, shape in COMMON
    ]
    for split in ("evaluation", "validation"):
        share = sum(scene.split == split for scene in single) / len(single)
        assert 0.08 < share < 0.17


def test_rare_combinations_are_drawn_for_evaluation_alone() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = sample_scene(rng, "evaluation", rare=True)
        assert scene.split == "evaluation"
        assert sum((item.color, item.shape) in RARE for item in scene.objects) == 1
    for split in ("training", "validation", "evaluation"):
        drawn = [sample_scene(rng, split) for _ in range(1000)]
        assert not {(item.color, item.shape) for scene in drawn for item in scene.objects} & set(RARE)
    for color in COLORS:  # every colour and every shape is known from other combinations
        assert sum(pair[0] == color for pair in COMMON) >= 3
    assert all(sum(pair[1] == shape for pair in COMMON) >= 5 for shape in SHAPES)


def test_digit_images_belong_to_one_split_each() -> None:
    rows = {split: [row for of_number in digits_of(split) for row in of_number] for split in SPLITS}
    everything = [row for found in rows.values() for row in found]
    assert len(everything) == len(set(everything)) == 1797
    labels = load_digits().target
    for split, found in rows.items():
        assert [min(len(of_number), 15) for of_number in digits_of(split)] == [15] * 10
        assert all(labels[row] == number for number, of in enumerate(digits_of(split)) for row in of)
        rng = random.Random(0)
        drawn = {item.digit for _ in range(500) for item in sample_scene(rng, split).objects} - {None}
        assert drawn <= set(found)


def test_sign_shows_its_digit_in_its_colour() -> None:
    """The picture inside the frame is the image of `load_digits`, each of its pixels four, darker the more ink."""
    digits = load_digits().images
    for row in (0, 17, 333):
        scene = Scene((SceneObject(4, "large", "red", "sign", row),), seed=row)
        cell = draw(scene)[24:48, 24:48].astype(float)
        rows, columns = np.nonzero(cell[:, :, 0] - cell[:, :, 1] > 100)
        top, left = rows.min(), columns.min()
        assert (rows.max() - top, columns.max() - left) == (21, 21)
        inside = cell[top + 3 : top + 19, left + 3 : left + 19].mean(axis=2)
        expected = digits[row].repeat(2, axis=0).repeat(2, axis=1)
        assert np.corrcoef(inside.ravel(), expected.ravel())[0, 1] < -0.99


def test_altered_scene_differs_in_one_attribute_of_one_object() -> None:
    rng = random.Random(0)
    for scene in scenes(200):
        twin = alter(scene, rng)
        assert len(twin.objects) == len(scene.objects)
        gone, come = set(scene.objects) - set(twin.objects), set(twin.objects) - set(scene.objects)
        (before,), (after,) = gone, come
        names = ("cell", "size", "color", "shape", "number")
        same = [getattr(before, name) == getattr(after, name) for name in names]
        assert same.count(False) == 1
        assert len({(item.color, item.shape) for item in twin.objects}) == len(twin.objects)
