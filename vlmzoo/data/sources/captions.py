"""A folder of images and captions: pairs of files of one name, or a table of both."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmzoo.data.records import Record, RecordError, to_record
from vlmzoo.data.sources.packed import PackedSource, Texts, caption
from vlmzoo.data.sources.source import Source, checked, file_fingerprint, unreadable
from vlmzoo.data.storage import ImageFolder

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CAPTIONS = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv")
TEXTS = ("text", "caption")  # the column of captions


def is_captions(folder: Path) -> bool:
    """Whether a folder looks like one: a table, or an image somewhere in it."""
    if any((folder / name).is_file() for name in TABLES):
        return True
    return any(name.lower().endswith(IMAGES) for _, _, names in os.walk(folder) for name in names)


def open_captions(folder: Path, images: str | None) -> Source:
    """The pairs of a folder, by the names of the images; those of its table, where it has one, in the table's order.

    Raises:
        RecordError: an image without a caption or with two, a caption without an image, a table without the columns.
    """
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such folder; expected images and captions")
    find = ImageFolder(Path(images).expanduser() if images else folder, str(folder))
    for name in TABLES:
        if (table := folder / name).is_file():
            rows = _csv_rows(table) if table.suffix == ".csv" else _jsonl_rows(table)
            return PackedSource(f"{folder.name}/{name}", rows, find, lambda: file_fingerprint(table))
    return Pairs(folder, find)


class Pairs(Source):
    """Images with a caption of the same name beside each, below a folder."""

    def __init__(self, folder: Path, find: ImageFolder) -> None:
        self._folder, self._find = folder, find
        self._names = Texts.of(name.encode(errors="surrogateescape") for name in _pairs(folder))
        if not len(self):
            raise RecordError(f"{folder}: holds no image; expected pairs such as a.jpg and a.txt")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        name = self._names[checked(index, len(self))]
        where, stem = f"{self._folder.name}[{index}]", self._folder / name.rpartition(".")[0]
        file = next((file for ending in CAPTIONS if (file := stem.with_name(stem.name + ending)).is_file()), None)
        if file is None:
            raise RecordError(f"{where} (id {name!r}): its caption is no longer there")
        try:
            text = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise unreadable(file, error) from None
        return to_record(caption(name, name, text), where, name, self._find)

    def fingerprint(self) -> dict[str, Any]:
        names = hashlib.sha256(self._names.memory.tobytes() + self._names.bounds.tobytes())
        return {"file": str(self._folder), "files": len(self), "names_sha256": names.hexdigest()}


def _pairs(folder: Path) -> Iterator[str]:
    """The images below a folder, in the order of their names."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        below = "" if place == str(folder) else Path(place).relative_to(folder).as_posix() + "/"
        captions = {name.rpartition(".")[0] for name in names if name.endswith(CAPTIONS)}
        images = sorted(name for name in names if name.lower().endswith(IMAGES))
        stems = {name.rpartition(".")[0] for name in images}
        if len(captions) < sum(name.endswith(CAPTIONS) for name in names) or len(stems) < len(images):
            twice = next(name for name in sorted(captions | stems) if _standing(names, name) > 2)
            raise RecordError(f"{folder}: {below}{twice} has two images or captions; expected one of each")
        if alone := sorted(stems - captions):
            raise RecordError(
                f"{folder}: an image {below}{alone[0]} has no caption; expected {alone[0]}.txt or .caption beside it"
            )
        if alone := sorted(captions - stems):
            raise RecordError(f"{folder}: caption {below}{alone[0]} has no image beside it")
        yield from (below + name for name in images)


def _standing(names: list[str], stem: str) -> int:
    """How many images and captions are called that."""
    return sum(name.rpartition(".")[0] == stem and name.lower().endswith(IMAGES + CAPTIONS) for name in names)


def _csv_rows(table: Path) -> Iterator[dict[str, Any]]:
    try:
        with table.open(encoding="utf-8", newline="") as stream:
            rows = csv.DictReader(stream, strict=True)
            for number, row in enumerate(rows):
                yield _row(row, f"{table}[{number}]")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(table, error) from None


def _jsonl_rows(table: Path) -> Iterator[dict[str, Any]]:
    try:
        with table.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream):
                if line.strip():
                    yield _row(json.loads(line), f"{table}[{number}]")
    except json.JSONDecodeError as error:
        raise RecordError(f"{table}: not valid JSON at line {number + 1}: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(table, error) from None


def _row(row: Any, where: str) -> dict[str, Any]:
    found = row if isinstance(row, dict) else {}
    text = next((found[column] for column in TEXTS if isinstance(found.get(column), str)), None)
    if text is None or not isinstance(found.get("file_name"), str):
        columns = ", ".join(map(str, found)) or "none"
        raise RecordError(f"{where}: has columns {columns}; expected `file_name` and `text` or `caption`")
    return caption(found["file_name"], found["file_name"], text.strip())
