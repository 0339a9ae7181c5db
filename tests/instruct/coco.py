"""A COCO folder of a few images, and ways to break it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CATEGORIES = ("person", "dog", "frisbee", "car")


def images(count: int) -> list[dict[str, Any]]:
    return [{"id": 10 + n, "file_name": f"{n:06d}.jpg", "width": 640, "height": 480} for n in range(count)]


def captions(count: int) -> list[dict[str, Any]]:
    texts = ("A person throws a frisbee to a brown dog ({}).", "A dog jumps for a frisbee in the park.")
    return [{"id": 2 * n + k, "image_id": 10 + n, "caption": texts[k].format(n)} for n in range(count) for k in (0, 1)]


def instances(count: int) -> list[dict[str, Any]]:
    boxes = ((1, [64, 96, 128, 288]), (2, [320, 240, 160, 192]), (3, [384, 96, 64, 48]))
    found = [(n, category, box) for n in range(count) for category, box in boxes]
    return [
        {"id": number, "image_id": 10 + n, "category_id": category, "bbox": box, "iscrowd": 0}
        for number, (n, category, box) in enumerate(found)
    ]


def write(folder: Path, count: int = 3, **changed: Any) -> Path:
    """Captions and instances of `count` images; `images`, `captions`, `instances` or `categories` in another form."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    parts = {"images": images(count), "captions": captions(count), "instances": instances(count)}
    parts["categories"] = [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, 1)]
    parts |= changed
    for kind in ("captions", "instances"):
        document = {"info": {"year": 2017}, "images": parts["images"], "annotations": parts[kind]}
        document |= {"categories": parts["categories"]} if kind == "instances" else {}
        (folder / "annotations" / f"{kind}_val2017.json").write_text(json.dumps(document))
    return folder
