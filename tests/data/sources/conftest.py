"""One small data set, in the form of every source that can hold it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmzoo.data.images import load_image
from vlmzoo.data.sources.source import Source

COUNT = 23


def picture(number: int) -> bytes:
    """A PNG of its own for each number."""
    noise = np.random.default_rng(number).integers(0, 255, (10 + number % 3, 12, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, format="PNG")
    return stream.getvalue()


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


@pytest.fixture
def values() -> list[dict[str, Any]]:
    """LLaVA's records: every fifth is text alone, every seventh has two images; texts that make JSON hard to scan."""
    found = []
    for number in range(COUNT):
        value: dict[str, Any] = {"id": f"r{number}"}
        answer = 'A "red" cube, {1: [\\2\\\\], …}\n' + "é" * number
        if number % 5 == 4:
            value["conversations"] = turns("Hello ]", answer)
        elif number % 7 == 6:
            value |= {"image": [f"{number}.png", f"sub/{number}.png"]}
            value["conversations"] = turns("<image>\n<image>\nWhich?", answer, "Why?", "So.")
        else:
            value |= {"image": f"{number}.png", "conversations": turns("<image>\nWhat is it?", answer)}
        found.append(value)
    return found


def names(value: dict[str, Any]) -> list[str]:
    image = value.get("image", [])
    return [image] if isinstance(image, str) else image


def content(name: str) -> bytes:
    return picture(int(Path(name).stem) + 100 * name.startswith("sub/"))


def write_images(folder: Path, values: list[dict[str, Any]]) -> None:
    for value in values:
        for name in names(value):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content(name))


def write_json(folder: Path, values: list[dict[str, Any]]) -> str:
    write_images(folder / "images", values)
    (folder / "data.json").write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    return str(folder / "data.json")


def write_jsonl(folder: Path, values: list[dict[str, Any]]) -> str:
    write_images(folder / "images", values)
    lines = [json.dumps(value) + "\n" for value in values]
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="\n")  # every other one empty
    return str(folder / "data.jsonl")


def rows(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with their images' bytes in cells."""
    cells = [[{"bytes": content(name), "path": None} for name in names(value)] for value in values]
    return [
        {"id": value["id"], "images": cell or None, "conversations": value["conversations"]}
        for value, cell in zip(values, cells, strict=True)
    ]


def write_parquet(folder: Path, values: list[dict[str, Any]]) -> str:
    """Two files of row groups of four."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows(values))
    half = len(values) // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        pyarrow.parquet.write_table(part, folder / f"{number}.parquet", row_group_size=4)
    return str(folder / "*.parquet")


def write_disk(folder: Path, values: list[dict[str, Any]]) -> str:
    import datasets

    datasets.Dataset.from_list(rows(values)).save_to_disk(str(folder / "saved"), num_shards=2)
    return str(folder / "saved")


def add(archive: tarfile.TarFile, name: str, data: bytes, mtime: float = 0) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(data), mtime  # pyright: ignore[reportAttributeAccessIssue]
    archive.addfile(member, io.BytesIO(data))


def write_shards(folder: Path, values: list[dict[str, Any]]) -> str:
    """Three shards: one plain, one with times that take extended headers, one with long names."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(3):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as archive:
            for value in values[shard::3] if len(values) < 3 else values[shard * 8 : (shard + 1) * 8]:
                key = value["id"] if shard < 2 else "long-" * 40 + value["id"]
                add(archive, f"{key}.json", json.dumps(value).encode(), 0.5 * (shard == 1))
                for number, name in enumerate(names(value)):
                    add(archive, f"{key}.{number}.png", content(name), 0.5 * (shard == 1))
    return str(folder / "{000..002}.tar")


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], str]] = {
    "json": write_json,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "saved to disk": write_disk,
    "webdataset": write_shards,
}


def told(source: Source) -> list[Any]:
    """All that a model sees of the records: ids, turns and pixels."""
    return [(record.id, record.turns, [load_image(image).tobytes() for image in record.images]) for record in source]
