"""Scenes: up to four coloured shapes and signs with handwritten digits on a 3x3 grid, and their pixels."""

import random
import zlib
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Literal

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
SIGN = "sign"
SIZES = ("small", "large")
RADII = {"small": (3, 4), "large": (9, 10)}  # pixels, both ends included
RARE = (("purple", "cross"), ("cyan", "triangle"), ("yellow", "square"), ("green", "circle"))
"""Colours and shapes that occur together in the questions about rare combinations and nowhere else."""

COMMON = tuple(pair for pair in product(COLORS, SHAPES) if pair not in RARE)
SIGN_RADIUS = 11  # pixels; the frame included
FRAME = 3
DIGIT_SIZE = 16  # pixels: each of a digit's 8 becomes 2
SIGN_SHARE = 0.3  # of all objects

Split = Literal["training", "validation", "evaluation"]
NUM_PARTS = 8  # one in so many scenes, and digit images, is kept for evaluation, and one for validation


@dataclass(frozen=True, order=True)
class SceneObject:
    """One object; `cell` counts the grid's cells row by row, `digit` is the row of a sign's image in `load_digits`."""

    cell: int
    size: str
    color: str
    shape: str
    digit: int | None = None

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID

    @property
    def number(self) -> str:
        """What a sign says; nothing for other shapes."""
        return "" if self.digit is None else str(digit_labels()[self.digit])


@dataclass(frozen=True)
class Scene:
    """Objects in the order of their cells, no two of one colour and shape; `seed` decides all that has no name."""

    objects: tuple[SceneObject, ...]
    seed: int = 0

    @property
    def key(self) -> str:
        """What makes two scenes the same: everything that can be said about them."""
        return "|".join(f"{item.cell}{item.size}{item.color}{item.shape}{item.number}" for item in self.objects)

    @property
    def split(self) -> Split:
        """Decided by the content alone, so that no scene can stand on both sides; a rare one is for evaluation."""
        if any((item.color, item.shape) in RARE for item in self.objects):
            return "evaluation"
        return split_of(zlib.crc32(self.key.encode()))


def split_of(number: int) -> Split:
    """Where a scene of this hash, or the digit image of this row, belongs."""
    part = number % NUM_PARTS
    return "evaluation" if part == 0 else "validation" if part == 1 else "training"


def sample_scene(rng: random.Random, split: Split = "training", *, rare: bool = False) -> Scene:
    """A scene of `split`: one to four objects; a narrow palette half of the time, so that colours repeat.

    Args:
        rare: one object is of a combination in RARE, which makes it a scene for evaluation.
    """
    digits = digits_of(split)
    while True:
        count = rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 4))
        num_signs = min(sum(rng.random() < SIGN_SHARE for _ in range(count)), count - rare)
        palette = rng.sample(tuple(COLORS), rng.choice((3, 4, 6, 6)))
        common: list[tuple[str, str]] = [pair for pair in COMMON if pair[0] in palette]
        pairs = rng.sample(common, count - num_signs)
        if rare:
            pairs[0] = rng.choice(RARE)
        pairs += [(color, SIGN) for color in rng.sample(tuple(COLORS), num_signs)]
        rng.shuffle(pairs)
        objects = []
        for cell, (color, shape) in zip(sorted(rng.sample(range(GRID * GRID), count)), pairs, strict=True):
            if shape == SIGN:
                objects.append(SceneObject(cell, "large", color, shape, rng.choice(rng.choice(digits))))
            else:
                objects.append(SceneObject(cell, rng.choice(SIZES), color, shape))
        scene = Scene(tuple(objects), rng.getrandbits(32))
        if rare or scene.split == split:
            return scene


def alter(scene: Scene, rng: random.Random) -> Scene:
    """The same scene with one attribute of one object changed: the hardest wrong answer. Its split is not looked at."""
    index = rng.randrange(len(scene.objects))
    item = scene.objects[index]
    taken = {(other.color, other.shape) for other in scene.objects}
    cells = {other.cell for other in scene.objects}
    changes = [replace(item, color=color) for color in COLORS if (color, item.shape) not in taken]
    changes += [replace(item, cell=cell) for cell in range(GRID * GRID) if cell not in cells]
    if item.digit is None:
        changes += [replace(item, size=size) for size in SIZES if size != item.size]
        changes += [replace(item, shape=shape) for shape in SHAPES if (item.color, shape) not in taken]
    else:
        digits = digits_of(split_of(item.digit))
        others = [rows for number, rows in enumerate(digits) if str(number) != item.number]
        changes += [replace(item, digit=rng.choice(rows)) for rows in others]
    objects = (*scene.objects[:index], rng.choice(changes), *scene.objects[index + 1 :])
    return replace(scene, objects=tuple(sorted(objects)))


@dataclass(frozen=True)
class _Placed:
    """All that is drawn by lot for one object: window, colour, and how bright a sign's paper and ink are."""

    item: SceneObject
    top: int
    left: int
    radius: int
    tint: list[float]
    paper: float = 0.0
    ink: float = 0.0

    @property
    def side(self) -> int:
        return 2 * self.radius + (self.item.digit is None)


def _place(scene: Scene) -> tuple[int, list[float], list[_Placed]]:
    """Which sheet of grain, the ground's colour, and every object's place."""
    rng = random.Random(scene.seed)
    start = rng.randrange(len(_grain()))
    ground = [rng.uniform(208, 246) for _ in range(3)]
    placed = []
    for item in scene.objects:
        tint = [value + rng.uniform(-16, 16) for value in COLORS[item.color]]
        low, high = RADII[item.size]
        radius = rng.randint(low, high) if item.digit is None else SIGN_RADIUS
        side = 2 * radius + (item.digit is None)
        top = item.row * CELL + rng.randint(0, CELL - side)  # the object stays inside its cell
        left = item.column * CELL + rng.randint(0, CELL - side)
        light = (0.0, 0.0) if item.digit is None else (255 - rng.uniform(0, 24), rng.uniform(20, 60))
        placed.append(_Placed(item, top, left, radius, tint, *light))
    return start, ground, placed


def boxes(scene: Scene) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) in pixels around what is seen of each object."""
    found = []
    for placed in _place(scene)[2]:
        rows, columns = np.array([0, placed.side - 1]), np.array([0, placed.side - 1])
        if placed.item.digit is None:
            rows, columns, _ = np.nonzero(_coverage(placed.item.shape, placed.radius) >= 0.5)
        left, top = placed.left + int(columns.min()), placed.top + int(rows.min())
        found.append((left, top, placed.left + int(columns.max()) + 1, placed.top + int(rows.max()) + 1))
    return found


def draw(scene: Scene) -> np.ndarray:
    """The scene's picture, uint8 (72, 72, 3): grainy light ground, jittered places, sizes and colours."""
    start, ground, objects = _place(scene)
    canvas = _grain()[start, :, :, None] + np.array(ground, np.float32)
    for placed in objects:
        item, top, left = placed.item, placed.top, placed.left
        window = canvas[top : top + placed.side, left : left + placed.side]
        if item.digit is None:
            window += _coverage(item.shape, placed.radius) * (np.array(placed.tint, np.float32) - window)
        else:
            window[:] = placed.tint
            window[FRAME:-FRAME, FRAME:-FRAME] = placed.paper + _ink()[item.digit] * (placed.ink - placed.paper)
    return canvas.clip(0, 255).astype(np.uint8)


@cache
def _coverage(shape: str, radius: int) -> np.ndarray:
    """How much of each pixel the shape covers, float32 (2 * radius + 1, 2 * radius + 1, 1)."""
    fine = 4  # samples a pixel and side: soft edges
    side = (2 * radius + 1) * fine
    axis = (np.arange(side) + 0.5) / side * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    if shape == "circle":
        inside = x**2 + y**2 <= 0.98**2
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.84
    elif shape == "triangle":
        inside = (abs(x) <= (y + 0.95) * 0.53) & (y <= 0.85)
    else:
        inside = (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.96)
    blocks = inside.reshape(2 * radius + 1, fine, 2 * radius + 1, fine)
    return blocks.mean(axis=(1, 3), dtype=np.float32)[:, :, None]


@cache
def _grain() -> np.ndarray:
    """Sheets of noise for the ground, float32 (64, 72, 72)."""
    coarse = np.random.default_rng(0).integers(-5, 6, (64, IMAGE_SIZE // 2, IMAGE_SIZE // 2)).astype(np.float32)
    return coarse.repeat(2, axis=1).repeat(2, axis=2)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images of 8x8 pixels, 0 to 16, and labels.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits (1998), as scikit-learn ships them.
    """
    from sklearn.datasets import load_digits  # takes a second

    found: Any = load_digits()
    return found.images, found.target


def digit_labels() -> np.ndarray:
    """What each row of `load_digits` shows, (1797,)."""
    return _digits()[1]


@cache
def digits_of(split: Split) -> tuple[tuple[int, ...], ...]:
    """For each number from 0 to 9 the rows of its images that belong to `split`."""
    labels = digit_labels().tolist()
    rows = [row for row in range(len(labels)) if split_of(row) == split]
    return tuple(tuple(row for row in rows if labels[row] == number) for number in range(10))


@cache
def _ink() -> np.ndarray:
    """How dark each digit's pixels are, float32 (1797, 16, 16, 1), 0 to 1."""
    images = _digits()[0].astype(np.float32) / 16
    return images.repeat(2, axis=1).repeat(2, axis=2)[..., None]
