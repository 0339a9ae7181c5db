"""Scenes: up to four coloured shapes on a 3x3 grid, and their pixels."""

import random
import zlib
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np

IMAGE_SIZE = 72  # pixels a side
GRID = 3  # cells a side
CELL = IMAGE_SIZE // GRID

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 44),
    "green": (44, 150, 62),
    "blue": (40, 84, 206),
    "yellow": (240, 202, 34),
    "purple": (138, 58, 168),
    "cyan": (52, 190, 206),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
RADII = {"small": (5, 6), "large": (9, 10)}  # pixels, both ends included

Split = Literal["training", "evaluation"]
EVALUATION_SHARE = 8  # one of so many scenes is kept for evaluation


@dataclass(frozen=True, order=True)
class SceneObject:
    """One object; `cell` counts the grid's cells row by row."""

    cell: int
    size: str
    color: str
    shape: str

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID


@dataclass(frozen=True)
class Scene:
    """Objects in the order of their cells, no two of one colour and shape; `seed` decides all that has no name."""

    objects: tuple[SceneObject, ...]
    seed: int = 0

    @property
    def key(self) -> str:
        """What makes two scenes the same: everything that can be said about them."""
        return "|".join(f"{item.cell}{item.size}{item.color}{item.shape}" for item in self.objects)

    @property
    def split(self) -> Split:
        """Decided by the content alone, so that no scene can stand on both sides."""
        return "training" if zlib.crc32(self.key.encode()) % EVALUATION_SHARE else "evaluation"


def sample_scene(rng: random.Random, split: Split = "training") -> Scene:
    """A scene of `split`: one to four objects; a narrow palette half of the time, so that colours repeat."""
    while True:
        count = rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 4))
        palette = rng.sample(tuple(COLORS), rng.choice((2, 3, 6, 6)))
        pairs = rng.sample([(color, shape) for color in palette for shape in SHAPES], count)
        cells = sorted(rng.sample(range(GRID * GRID), count))
        placed = zip(cells, pairs, strict=True)
        objects = tuple(SceneObject(cell, rng.choice(SIZES), color, shape) for cell, (color, shape) in placed)
        scene = Scene(objects, rng.getrandbits(32))
        if scene.split == split:
            return scene


def alter(scene: Scene, rng: random.Random) -> Scene:
    """The same scene with one attribute of one object changed: the hardest wrong answer. Its split is not looked at."""
    index = rng.randrange(len(scene.objects))
    item = scene.objects[index]
    taken = {(other.color, other.shape) for other in scene.objects}
    changes = [replace(item, size=size) for size in SIZES if size != item.size]
    changes += [replace(item, color=color) for color in COLORS if (color, item.shape) not in taken]
    changes += [replace(item, shape=shape) for shape in SHAPES if (item.color, shape) not in taken]
    cells = {other.cell for other in scene.objects}
    changes += [replace(item, cell=cell) for cell in range(GRID * GRID) if cell not in cells]
    objects = (*scene.objects[:index], rng.choice(changes), *scene.objects[index + 1 :])
    return replace(scene, objects=tuple(sorted(objects)))


@cache
def _coverage(shape: str, radius: int) -> np.ndarray:
    """How much of each pixel the shape covers, float32 (2 * radius + 1, 2 * radius + 1, 1)."""
    fine = 4  # samples a pixel and side: soft edges
    side = (2 * radius + 1) * fine
    axis = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = axis[None, :], axis[:, None]
    if shape == "circle":
        inside = x**2 + y**2 <= 1
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.86
    elif shape == "triangle":
        inside = (abs(x) <= (y + 0.95) * 0.53) & (y <= 0.85)
    else:
        inside = (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.96)
    blocks = inside.reshape(2 * radius + 1, fine, 2 * radius + 1, fine)
    return blocks.mean(axis=(1, 3), dtype=np.float32)[:, :, None]


def draw(scene: Scene) -> np.ndarray:
    """The scene's picture, uint8 (72, 72, 3): grainy light ground, jittered places, sizes and colours."""
    rng = np.random.default_rng(scene.seed)
    grain = rng.integers(-5, 6, (IMAGE_SIZE // 2, IMAGE_SIZE // 2, 1)).astype(np.float32)
    canvas = grain.repeat(2, axis=0).repeat(2, axis=1) + rng.uniform(208, 246, 3).astype(np.float32)
    for item in scene.objects:
        tint = rng.uniform(-16, 16, 3)
        unit = rng.random(3)
        low, high = RADII[item.size]
        radius = low + int(unit[0] * (high - low + 1))
        play = CELL - 2 * radius - 1  # free pixels: the object stays inside its cell
        top = item.row * CELL + int(unit[1] * (play + 1))
        left = item.column * CELL + int(unit[2] * (play + 1))
        coverage = _coverage(item.shape, radius)
        window = canvas[top : top + 2 * radius + 1, left : left + 2 * radius + 1]
        window += coverage * ((np.asarray(COLORS[item.color]) + tint).astype(np.float32) - window)
    return canvas.clip(0, 255).astype(np.uint8)
