"""The world's scenes as a COCO folder: captions, instances with boxes, images."""

import json
from pathlib import Path

from PIL import Image

from vlmzoo.world import VERSION
from vlmzoo.world.datasets import examples, write_once
from vlmzoo.world.scenes import IMAGE_SIZE, SHAPES, SIGN, Scene, SceneObject, boxes, draw
from vlmzoo.world.text import PLACES

CATEGORIES = (*SHAPES, SIGN)


def write_coco(name: str, directory: Path, size: int, seed: int) -> Path:
    """A folder under `directory` with `annotations/{captions,instances}_world.json` and `images/`.

    The scenes are those of the data set `name`; what a sign says is not told, as COCO's captions seldom do.

    Raises:
        ValueError: no data set has this name, or `size` is not positive.
    """
    stream = examples(name, size, seed)
    folder = directory / f"coco-{name}-v{VERSION}-{size}-{seed}"

    def fill(aside: Path) -> None:
        images, captions, instances = [], [], []
        for number, (scene, _) in enumerate(stream):
            image = {"id": number, "file_name": f"{name}-{number:06d}.png", "width": IMAGE_SIZE, "height": IMAGE_SIZE}
            Image.fromarray(draw(scene)).save(aside / "images" / str(image["file_name"]), compress_level=1)
            images.append(image)
            for text in describe(scene):
                captions.append({"id": len(captions), "image_id": number, "caption": text})
            for item, (left, top, right, bottom) in zip(scene.objects, boxes(scene), strict=True):
                size_of = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
                category = CATEGORIES.index(item.shape)
                instances.append({"id": len(instances), "image_id": number, "category_id": category, **size_of})
        (aside / "annotations").mkdir()
        categories = [{"id": number, "name": shape} for number, shape in enumerate(CATEGORIES)]
        for kind, annotations in (("captions", captions), ("instances", instances)):
            document = {"images": images, "annotations": annotations, "categories": categories}
            (aside / "annotations" / f"{kind}_world.json").write_text(json.dumps(document))

    write_once(folder, fill)
    return folder


def describe(scene: Scene) -> list[str]:
    """Two captions in plain English, the second in the opposite order."""
    placed = [f"{_name(item)} in the {PLACES[item.cell]}" for item in scene.objects]
    named = [_name(item) for item in reversed(scene.objects)]
    return [_sentence(placed), _sentence(named)]


def _name(item: SceneObject) -> str:
    return f"a {item.color} {item.shape}" if item.digit is not None else f"a {item.size} {item.color} {item.shape}"


def _sentence(parts: list[str]) -> str:
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{text[0].upper()}{text[1:]}."
