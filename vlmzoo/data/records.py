"""LLaVA's records, of whatever source -> records whose structure has been checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from vlmzoo.data.images import ImageFile
from vlmzoo.files import StoredBytes
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
    images: tuple[ImageFile, ...]
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


def to_record(value: Any, where: str, name: str, find: Callable[[str, str], ImageFile]) -> Record:
    """A record of LLaVA's form, checked; its images are found but not decoded.

    `image` is a name, or stored bytes, or a list of several; without it a record is text alone.

    Args:
        where: names the record in messages, to which its `id` is added.
        name: its id where it has none.
        find: the image of a name; its second argument names the record in messages.

    Raises:
        RecordError: a record with a fault.
        ImageError: what `find` raises.
    """
    if not isinstance(value, dict):
        raise RecordError(f"{where}: expected an object with `conversations`, got {_kind(value)}")
    name = str(value.get("id", name))
    where = f"{where} (id {shown(name)})"
    turns = _turns(value, where)
    images = value.get("image", [])
    images = [images] if isinstance(images, str | StoredBytes) else images
    if not isinstance(images, list) or not all(isinstance(item, str | StoredBytes) and item for item in images):
        raise RecordError(f"{where}: `image` must be a path or a list of paths, got {shown(value['image'])}")
    placeholders = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if placeholders != len(images):
        raise RecordError(
            f"{where}: {placeholders} {IMAGE_TOKEN} in its human turns for {len(images)} images", "image-count"
        )
    extras = {key: value.get(key) for key in ("capability", "description")}
    for key, extra in extras.items():
        if not isinstance(extra, str | None):
            raise RecordError(f"{where}: `{key}` must be a text, got {_kind(extra)}")
    for text in (name, *(turn.text for turn in turns), *(extra or "" for extra in extras.values())):
        if (place := _half_character(text)) is not None:
            raise RecordError(f"{where}: {shown(text)} is no text: half a character (a lone surrogate) at {place}")
    found = tuple(find(item, where) if isinstance(item, str) else item for item in images)
    return Record(name, found, turns, where, **extras)


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
