"""A COCO folder -> what is known of each image: its captions, and its objects with boxes from 0 to 1."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vlmzoo.instruct.members import members

Box = tuple[float, float, float, float]  # left, top, right, bottom, from 0 to 1
TOLERANCE = 1.0  # pixels that a box may stand out of its image, for rounding
MAX_ID = 2**63 - 1


class AnnotationError(ValueError):
    """A folder or a file that cannot be used; the message names it."""


@dataclass(frozen=True, slots=True)
class Thing:
    """An object with its box; a crowd is several of them in one box."""

    category: str
    box: Box
    crowd: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the teacher is told of an image, and its size (width, height) in pixels."""

    id: int
    file_name: str
    size: tuple[int, int]
    captions: tuple[str, ...]
    things: tuple[Thing, ...]


@dataclass
class Faults:
    """How many annotations had which fault, and where the first one stands."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, where: str, count: int = 1) -> None:
        if count:
            self.counts[what] = self.counts.get(what, 0) + count
            self.first.setdefault(what, where)

    def lines(self) -> list[str]:
        return [f"{count} x {what}, first {self.first[what]}" for what, count in self.counts.items()]


class Annotations(Sequence[Facts]):
    """The images that have captions, in the order of their ids; built on access, kept as flat arrays."""

    def __init__(self, ids: np.ndarray, sizes: np.ndarray, names: _Texts, captions: _Rows, things: _Rows) -> None:
        self._ids, self._sizes, self._names, self._captions, self._things = ids, sizes, names, captions, things
        self.categories: tuple[str, ...] = ()
        self.faults = Faults()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: Any) -> Facts:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        width, height = self._sizes[index].tolist()
        captions, things = self._captions.of(index), self._things.of(index)
        return Facts(int(self._ids[index]), self._names[index], (width, height), tuple(captions), tuple(things))


def read_coco(folder: Path) -> Annotations:
    """The images of all `annotations/{captions,instances}_*.json` below a folder; image files are not looked for.

    What is wrong with a single annotation is counted in `faults`, and it is left out.

    Raises:
        AnnotationError: no such files, or none of their images can be used.
        MembersError: a file that is not JSON.
    """
    if not folder.is_dir():
        raise AnnotationError(f"{folder}: no such folder; expected one with annotations/captions_*.json")
    found = {kind: sorted((folder / "annotations").glob(f"{kind}_*.json")) for kind in ("captions", "instances")}
    for kind, files in found.items():
        if not files:
            raise AnnotationError(f"{folder}: no annotations/{kind}_*.json in it")
    tables = _Tables()
    for path in (*found["captions"], *found["instances"]):
        tables.read(path)
    return tables.finished(folder)


class _Texts:
    """Strings in one buffer."""

    def __init__(self) -> None:
        self.bytes, self.ends = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        self.bytes += text.encode("utf-8", "replace")
        self.ends.append(len(self.bytes))

    def __getitem__(self, index: int) -> str:
        return self.bytes[self.ends[index] : self.ends[index + 1]].decode()


class _Rows:
    """Which rows of a table belong to which image: `rows[starts[i] : starts[i + 1]]` to the i-th."""

    def __init__(self, image: np.ndarray, kept: np.ndarray, num_images: int, get: Callable[[int], Any]) -> None:
        rows = np.flatnonzero(kept)
        order = np.argsort(image[rows], kind="stable")
        self.rows = rows[order].astype(np.int32)
        self.starts = np.searchsorted(image[rows][order], np.arange(num_images + 1)).astype(np.int32)
        self.get = get

    def of(self, index: int) -> list[Any]:
        return [self.get(row) for row in self.rows[self.starts[index] : self.starts[index + 1]].tolist()]


class _Tables:
    def __init__(self) -> None:
        self.faults = Faults()
        self.image_ids, self.sizes, self.names = array("q"), array("q"), _Texts()
        self.caption_images, self.captions = array("q"), _Texts()
        self.box_images, self.box_categories, self.boxes, self.crowds = array("q"), array("q"), array("d"), array("b")
        self.categories: dict[int, str] = {}

    def read(self, path: Path) -> None:
        captions = path.name.startswith("captions_")
        number = 0
        for key, item in members(path):
            number += 1
            where = f"{path.name}: item {number}"
            if key not in ("images", "annotations", "categories"):
                continue
            if not isinstance(item, dict):
                self.faults.add(f"{key}: no object", where)
            elif key == "images":
                self.image(item, where)
            elif key == "categories":
                self.category(item, where)
            else:
                where = f"{where} (id {item.get('id')!r})"
                self.caption(item, where) if captions else self.box(item, where)

    def image(self, item: dict[str, Any], where: str) -> None:
        name, size = item.get("file_name"), [item.get("width"), item.get("height")]
        if not _is_id(item.get("id")):
            self.faults.add("image without a usable id", where)
        elif not isinstance(name, str) or not name or PurePosixPath(name).is_absolute() or ".." in name.split("/"):
            self.faults.add("image without a usable file_name", where)
        elif not all(map(_is_size, size)):
            self.faults.add("image without a usable width and height", where)
        else:
            self.image_ids.append(item["id"])
            self.sizes.extend([item["width"], item["height"]])
            self.names.append(name)

    def category(self, item: dict[str, Any], where: str) -> None:
        if not _is_id(item.get("id")) or not isinstance(item.get("name"), str) or not item["name"].strip():
            self.faults.add("category without a usable id and name", where)
        elif self.categories.setdefault(item["id"], item["name"].strip()) != item["name"].strip():
            raise AnnotationError(f"{where}: category {item['id']} is {item['name']!r} here and elsewhere otherwise")

    def caption(self, item: dict[str, Any], where: str) -> None:
        text = item.get("caption")
        if not _is_id(item.get("image_id")):
            self.faults.add("annotation of an unknown image", where)
        elif not isinstance(text, str) or not text.strip():
            self.faults.add("caption without text", where)
        else:
            self.caption_images.append(item["image_id"])
            self.captions.append(" ".join(text.split()))

    def box(self, item: dict[str, Any], where: str) -> None:
        box = item.get("bbox")
        if not _is_id(item.get("image_id")):
            self.faults.add("annotation of an unknown image", where)
        elif not _is_id(item.get("category_id")):
            self.faults.add("annotation of an unknown category", where)
        elif not isinstance(box, list) or len(box) != 4 or not all(type(value) in (int, float) for value in box):
            self.faults.add("box that is not four numbers", where)
        elif not all(abs(value) < 1e9 for value in box):  # nor is NaN
            self.faults.add("box with NaN or infinity", where)
        else:
            self.box_images.append(item["image_id"])
            self.box_categories.append(item["category_id"])
            self.boxes.extend(box)
            self.crowds.append(item.get("iscrowd") == 1)

    def finished(self, folder: Path) -> Annotations:
        ids = np.asarray(self.image_ids, np.int64)
        ids, first, again = np.unique(ids, return_index=True, return_inverse=True)
        sizes = np.asarray(self.sizes, np.int64).reshape(-1, 2)
        self.check_same(sizes, first, again)  # captions and instances name the same images
        sizes = sizes[first]
        caption_image = _find(np.asarray(self.caption_images, np.int64), ids)
        self.count("annotation of an unknown image", caption_image < 0, np.asarray(self.caption_images), "caption of")
        captioned = np.zeros(len(ids), bool)
        captioned[caption_image[caption_image >= 0]] = True
        self.count("image without captions", ~captioned, ids, "image")
        if not captioned.any():
            why = f"; {self.faults.lines()[0]}" if self.faults.counts else ""
            raise AnnotationError(f"{folder}: none of its {len(ids)} images has a caption{why}")

        box_image = _find(np.asarray(self.box_images, np.int64), ids)
        names = sorted(self.categories)
        category = _find(np.asarray(self.box_categories, np.int64), np.asarray(names, np.int64))
        self.count("annotation of an unknown image", box_image < 0, np.asarray(self.box_images), "box of")
        self.count("annotation of an unknown category", category < 0, np.asarray(self.box_categories), "category")
        boxes = np.asarray(self.boxes, np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        bounds = np.tile(sizes[box_image], 2) if len(ids) else boxes
        known = (box_image >= 0) & (category >= 0)
        outside = ((boxes < -TOLERANCE) | (boxes > bounds + TOLERANCE)).any(1)
        boxes = (boxes / bounds).clip(0, 1).astype(np.float32)
        empty = (boxes[:, 2:] <= boxes[:, :2]).any(1) & ~outside
        images = np.asarray(self.box_images, np.int64)
        self.count("box outside its image", known & outside, images, "in image")
        self.count("box without an area", known & empty, images, "in image")

        place = np.cumsum(captioned) - 1  # of an image among those with captions
        kept = known & ~outside & ~empty & captioned[box_image]
        labels, crowds, captions = [self.categories[key] for key in names], self.crowds, self.captions
        category = category.astype(np.int16 if len(names) < 2**15 else np.int32)

        def thing(row: int) -> Thing:
            left, top, right, bottom = (round(value, 3) for value in boxes[row].tolist())
            return Thing(labels[category[row]], (left, top, right, bottom), bool(crowds[row]))

        total = int(captioned.sum())
        image_names = _Texts()
        for index in first[captioned].tolist():
            image_names.append(self.names[index])
        found = Annotations(
            ids[captioned],
            sizes[captioned],
            image_names,
            _Rows(place[caption_image], caption_image >= 0, total, captions.__getitem__),
            _Rows(place[box_image], kept, total, thing),
        )
        found.categories, found.faults = tuple(labels), self.faults
        return found

    def check_same(self, sizes: np.ndarray, first: np.ndarray, again: np.ndarray) -> None:
        """Raises where an id names two images: their captions and boxes would be mixed."""
        for row in np.flatnonzero(first[again] != np.arange(len(again))).tolist():
            other = int(first[again[row]])
            if self.names[row] != self.names[other] or (sizes[row] != sizes[other]).any():
                name, two = self.names[other], self.names[row]
                raise AnnotationError(f"image id {self.image_ids[row]} is {name!r} and also {two!r}, or in two sizes")

    def count(self, what: str, faulty: np.ndarray, values: np.ndarray, noun: str) -> None:
        if faulty.any():
            self.faults.add(what, f"{noun} {values[faulty.argmax()]}", int(faulty.sum()))


def _find(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The index of each value in the sorted `known`; -1 where it is not there."""
    if not len(known):
        return np.full(len(values), -1)
    index = np.searchsorted(known, values).clip(max=len(known) - 1)
    return np.where(known[index] == values, index, -1)


def _is_id(value: Any) -> bool:
    return type(value) is int and abs(value) <= MAX_ID


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31
