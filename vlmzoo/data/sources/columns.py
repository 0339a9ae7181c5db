"""Rows of tables, as the hub's data sets have them -> values of LLaVA's form."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmzoo.data.images import ImageError
from vlmzoo.data.records import IMAGE_TOKEN, Record, RecordError, to_record
from vlmzoo.data.sources.source import Source, checked
from vlmzoo.data.storage import ImageFolder
from vlmzoo.files import StoredBytes

IMAGES = ("image", "images")
TALKS = ("conversations", "texts", "messages")  # LLaVA's, the Cauldron's, a chat's
EXTRAS = ("id", "capability", "description")
ROLES = {"user": "human", "assistant": "gpt"}

Row = Mapping[str, Any]
"""pyarrow's scalars by column."""


@dataclass(frozen=True)
class CellImage(StoredBytes):
    """An image in a cell of a table."""

    table: str
    row: int
    number: int  # of the images of its row
    part_of: Path | None = field(compare=False)
    source: TableSource = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.table}[{self.row}].images[{self.number}]"

    def read(self) -> bytes:
        return self.source.image(self)

    @property
    def file(self) -> Path | None:
        return self.part_of

    @property
    def in_block(self) -> bool:
        return self.source.blocks is not None


class TableSource(Source):
    """Records in rows of Arrow's columns.

    An image's cell holds its bytes, or a name below the image folder, or both (`bytes`, `path`), or a list of these.

    Args:
        name: the data set, for messages.

    Raises:
        RecordError: columns that hold no conversations.
    """

    def __init__(self, name: str, columns: Sequence[str], find: ImageFolder) -> None:
        talk = next((column for column in TALKS if column in columns), None)
        if talk is None:
            raise RecordError(
                f"{name}: has columns {', '.join(columns)}; expected conversations in {_or(TALKS)}, and images, where "
                f"there are any, in {_or(IMAGES)}"
            )
        self._talk = talk
        self._image, self._find = next((column for column in IMAGES if column in columns), None), find
        self._read = [column for column in (self._image, talk, *EXTRAS) if column is not None and column in columns]

    @abstractmethod
    def _row(self, index: int) -> Row:
        """The cells of the columns that are read."""

    @abstractmethod
    def _place(self, index: int) -> tuple[str, int, Path | None]:
        """The table that a row is in, its number there, and the file on this machine that the table is in."""

    @abstractmethod
    def _index(self, image: CellImage) -> int:
        """The row of an image."""

    def __getitem__(self, index: int) -> Record:
        row = self._row(checked(index, len(self)))
        table, number, file = self._place(index)
        where = f"{table.rpartition('/')[2]}[{number}]"
        images: list[str | StoredBytes] = []
        try:
            for place, cell in enumerate(self._cells(row)):
                images.append(_name(cell, where) or CellImage(table, number, place, file, self))
            extras = {column: row[column].as_py() for column in EXTRAS if column in row}
            talk = _turns(self._talk, row[self._talk].as_py(), len(images))
        except UnicodeDecodeError as error:
            raise RecordError(f"{where}: cannot be read ({error})") from None
        value = {key: extra for key, extra in extras.items() if extra is not None}
        if "id" in value:
            value["id"] = str(value["id"])
        value["conversations"] = talk
        return to_record(value | ({"image": images} if images else {}), where, str(index), self._find)

    def image(self, image: CellImage) -> bytes:
        """The bytes of an image in a cell."""
        cell = self._cells(self._row(self._index(image)))[image.number]
        return _bytes(cell).as_py()

    def _cells(self, row: Row) -> list[Any]:
        """Each image's cell; its bytes are not copied."""
        import pyarrow

        cell = None if self._image is None else row[self._image]
        if cell is None or not cell.is_valid:
            return []
        if pyarrow.types.is_list(cell.type) or pyarrow.types.is_large_list(cell.type):
            return list(cell.values)
        return [cell]


def _bytes(cell: Any) -> Any:
    """The bytes of an image's cell, as pyarrow's scalar; None: it has no place for them."""
    import pyarrow

    if pyarrow.types.is_struct(cell.type):
        return cell["bytes"] if "bytes" in cell.type.names and cell["bytes"].is_valid else None
    return cell if pyarrow.types.is_binary(cell.type) or pyarrow.types.is_large_binary(cell.type) else None


def _name(cell: Any, where: str) -> str | None:
    """The image's name where the cell holds no bytes; None: it holds bytes."""
    import pyarrow

    if cell.is_valid and (found := _bytes(cell)) is not None and found.is_valid:
        return None
    if cell.is_valid and pyarrow.types.is_struct(cell.type) and "path" in cell.type.names:
        cell = cell["path"]
    name = cell.as_py() if cell.is_valid else None
    if not isinstance(name, str) or not name:
        raise ImageError(f"{where}: an image's cell is {cell.type}, got nothing in it; expected bytes or a path")
    return name


def _turns(column: str, found: Any, num_images: int) -> Any:
    """LLaVA's turns; what is no such column's is given on, for the check that names the record."""
    if column == "conversations" or not isinstance(found, list):
        return found
    turns: list[Any] = []
    for item in found:
        if column == "texts" and isinstance(item, dict):
            turns += [{"from": "human", "value": item.get("user")}, {"from": "gpt", "value": item.get("assistant")}]
        elif column == "messages" and isinstance(item, dict):
            role = item.get("role")
            turns.append({"from": ROLES.get(str(role), role), "value": _content(item.get("content"))})
        else:
            turns.append(item)
    texts = [turn["value"] for turn in turns if isinstance(turn, dict)]
    if turns and isinstance(turns[0], dict) and not any(isinstance(t, str) and IMAGE_TOKEN in t for t in texts):
        first = turns[0]["value"]
        turns[0] = turns[0] | {"value": f"{IMAGE_TOKEN}\n" * num_images + first if isinstance(first, str) else first}
    return turns


def _content(content: Any) -> Any:
    """A message's text: as it is, or its parts in their order."""
    if not isinstance(content, list):
        return content
    parts = [item if isinstance(item, dict) else {"text": item} for item in content]
    said = [f"{IMAGE_TOKEN}\n" if part.get("type") == "image" else part.get("text") for part in parts]
    return "".join(text for text in said if isinstance(text, str))


def _or(names: Sequence[str]) -> str:
    return " or ".join((", ".join(f"`{name}`" for name in names[:-1]), f"`{names[-1]}`"))
