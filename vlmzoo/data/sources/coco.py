"""COCO's captions: a record an annotation, so that an image is seen with each of its captions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmzoo.data.records import RecordError
from vlmzoo.data.sources.packed import PackedSource, caption
from vlmzoo.data.sources.source import Source, file_fingerprint, unreadable
from vlmzoo.data.storage import ImageFolder
from vlmzoo.registry import unknown


def open_coco(folder: Path, split: str | None, images: str | None) -> Source:
    """The captions of one of COCO's splits, in the order of its annotations.

    Args:
        folder: with `annotations/captions_SPLIT.json`.
        images: the folder of the images; None: `SPLIT/` in the folder, or `images/`.

    Raises:
        RecordError: not a folder of COCO, a split that it lacks, or several of which none is named.
    """
    files = {file.stem.removeprefix("captions_"): file for file in sorted(folder.glob("annotations/captions_*.json"))}
    if not files:
        raise RecordError(f"{folder}: expected COCO's annotations/captions_*.json, got none")
    if split is None and len(files) > 1:
        raise RecordError(f"{folder}: has splits {', '.join(files)}; name one, as {folder}:{next(iter(files))}")
    if split is not None and split not in files:
        raise RecordError(f"{folder}: {unknown('split', split, files)}")
    name = split or next(iter(files))
    own = folder / name if (folder / name).is_dir() else folder / "images"
    find = ImageFolder(Path(images).expanduser() if images else own, str(files[name]))
    return PackedSource(files[name].name, _values(files[name]), find, lambda: file_fingerprint(files[name]))


def _values(file: Path) -> Iterator[dict[str, Any]]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RecordError(f"{file}: not valid JSON at line {error.lineno}: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(file, error) from None
    try:
        names = {image["id"]: image["file_name"] for image in document["images"]}
        annotations = document["annotations"]
    except (KeyError, TypeError) as error:
        raise RecordError(f"{file}: expected COCO's `images` and `annotations`, lacks {error}") from None
    for index, item in enumerate(annotations):
        where = f"{file}: annotations[{index}]"
        if not isinstance(item, dict) or not isinstance(item.get("caption"), str):
            raise RecordError(f"{where}: expected an object with `id`, `image_id` and `caption`")
        if item.get("image_id") not in names:
            raise RecordError(f"{where}: image_id {item.get('image_id')!r} is none of its images")
        yield caption(str(item.get("id", index)), names[item["image_id"]], item["caption"].strip())
