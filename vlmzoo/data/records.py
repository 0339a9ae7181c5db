"""LLaVA's JSON -> records whose structure has been checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vlmzoo.data.images import image_path
from vlmzoo.registry import shown

IMAGE_TOKEN = "<image>"
Role = Literal["human", "gpt"]
ROLES: tuple[Role, Role] = ("human", "gpt")


class RecordError(ValueError):
    """A record or a data set that cannot be used; the message names it, `kind` says in a word what is wrong."""

    def __init__(self, message: str, kind: str = "bad-structure") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation about images. Human and gpt turns alternate; the n-th `<image>` stands for the n-th image."""

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]
    where: str  # names the record in messages: train.json[17] (id 'abc')
    capability: str | None = None  # what a question asks for, in evaluation data
    description: str | None = None  # what its image shows, for the baseline that reads it instead

    def seen_as(self, text: str | None) -> Record:
        """The record without its images; `text`, where there is any, in the place of each `<image>`."""
        turns = []
        for turn in self.turns:
            replaced = turn.text.replace(IMAGE_TOKEN, text or "") if turn.role == "human" else turn.text
            turns.append(Turn(turn.role, replaced.strip()))
        return replace(self, images=(), turns=tuple(turns))


def read_records(json_path: Path, image_folder: Path, limit: int | None = None) -> list[Record]:
    """The records of a LLaVA JSON file, every one checked; images are found but not decoded.

    `image` is a path below the image folder, or a list of several; without it a record is text alone. A record
    without `id` is known by its index.

    Args:
        limit: only the first so many records.

    Raises:
        RecordError: a file that is no JSON list or holds no record, or a record with a fault.
        ImageError: an image that is missing or lies outside the folder.
    """
    return list(LlavaRecords(json_path, image_folder, limit))


class LlavaRecords(Sequence[Record]):
    """The same, each record checked when it is asked for."""

    def __init__(self, json_path: Path, image_folder: Path, limit: int | None = None) -> None:
        self._values, self._name = _values(json_path, image_folder, limit), json_path.name
        self._folder = image_folder.resolve()

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _record(self._values[index], f"{self._name}[{index}]", index, self._folder)


def _values(json_path: Path, image_folder: Path, limit: int | None) -> list[Any]:
    try:
        values = json.loads(json_path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RecordError(f"{json_path}: not valid JSON at line {error.lineno}: {error.msg}") from None
    except OSError as error:
        raise RecordError(f"{json_path}: cannot be read ({error})", "unreadable") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{json_path}: cannot be read ({error})") from None
    except (RecursionError, ValueError):  # as Python's decoder refuses what JSON allows
        raise RecordError(f"{json_path}: nested too deeply, or holds a number of thousands of digits") from None
    if not isinstance(values, list):
        raise RecordError(f"{json_path}: expected a list of records, got {_kind(values)}")
    if limit is not None and limit < 1:
        raise RecordError(f"{json_path}: limit {limit} leaves no record; expected at least 1")
    if not values:
        raise RecordError(f"{json_path}: holds no record; expected at least one")
    if any(isinstance(value, dict) and value.get("image") for value in values[:limit]) and not image_folder.is_dir():
        raise RecordError(f"{json_path}: its records have images, but there is no image folder {image_folder}")
    return values[:limit]


def _record(value: Any, where: str, index: int, folder: Path) -> Record:
    if not isinstance(value, dict):
        raise RecordError(f"{where}: expected an object with `conversations`, got {_kind(value)}")
    name = str(value.get("id", index))
    where = f"{where} (id {shown(name)})"
    turns = _turns(value, where)
    names = value.get("image", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(item, str) and item for item in names):
        raise RecordError(f"{where}: `image` must be a path or a list of paths, got {shown(value['image'])}")
    placeholders = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if placeholders != len(names):
        raise RecordError(
            f"{where}: {placeholders} {IMAGE_TOKEN} in its human turns for {len(names)} images", "image-count"
        )
    extras = {key: value.get(key) for key in ("capability", "description")}
    for key, extra in extras.items():
        if not isinstance(extra, str | None):
            raise RecordError(f"{where}: `{key}` must be a text, got {_kind(extra)}")
    for text in (name, *(turn.text for turn in turns), *(extra or "" for extra in extras.values())):
        if (place := _half_character(text)) is not None:
            raise RecordError(f"{where}: {shown(text)} is no text: half a character (a lone surrogate) at {place}")
    return Record(name, tuple(image_path(folder, item, where) for item in names), turns, where, **extras)


def _turns(value: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    found = value.get("conversations")
    if not isinstance(found, list) or not found:
        raise RecordError(f"{where}: `conversations` must be a list of turns, got {_kind(found)}")
    turns = []
    for index, item in enumerate(found):
        place, role = f"{where}: turn {index}", ROLES[index % 2]
        if not isinstance(item, dict) or not isinstance(item.get("value"), str):
            raise RecordError(f"{place}: expected an object with texts `from` and `value`, got {_kind(item)}")
        if item.get("from") != role:
            raise RecordError(
                f"{place} is from {shown(item.get('from'))}, expected {role!r}: human begins, gpt answers"
            )
        if role == "gpt" and not item["value"].strip():
            raise RecordError(f"{place}: the answer is empty", "empty-answer")
        if role == "gpt" and IMAGE_TOKEN in item["value"]:
            raise RecordError(f"{place}: the answer holds {IMAGE_TOKEN}, which belongs to human turns", "image-count")
        turns.append(Turn(role, item["value"]))
    if len(turns) % 2:
        raise RecordError(f"{where}: the last human turn has no answer from gpt")
    return tuple(turns)


def _half_character(text: str) -> int | None:
    """Where a text has one, which JSON can write and no tokenizer or file takes; None: nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _kind(value: object) -> str:
    """What a JSON value is, for messages."""
    if isinstance(value, list | dict) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    names = {dict: "an object", list: "a list", str: "a text", type(None): "nothing", bool: "true or false"}
    return names.get(type(value), "a number")
