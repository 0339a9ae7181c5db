"""Hugging Face data sets: saved to disk, or by their name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmzoo.data.records import RecordError
from vlmzoo.data.sources.columns import CellImage, Row, TableSource
from vlmzoo.data.sources.source import unreadable
from vlmzoo.data.storage import ImageFolder, place
from vlmzoo.registry import unknown


class HubDataset(TableSource):
    """The rows of a data set of the library `datasets`, memory-mapped; nothing of it is run.

    Args:
        path: `hf:OWNER/NAME`, with `/CONFIG` where it has several, or a folder that `save_to_disk` wrote.
        split: which, where there are several.
        images: where images are that cells only name; None: `images/` in the folder, or the current one's.

    Raises:
        RecordError: no such data set, config or split, or columns that hold no conversations.
    """

    def __init__(self, path: str, split: str | None, images: str | None) -> None:
        self._path = path if split is None else f"{path}:{split}"
        data = _split(_loaded(path), split, path)
        folder = Path("images") if path.startswith("hf:") else Path(path).expanduser() / "images"
        super().__init__(self._path, data.column_names, ImageFolder(place(images) if images else folder, self._path))
        self._data = data.select_columns(self._read).with_format("arrow")
        self._fingerprint = data._fingerprint
        files = data.cache_files  # written once: a data set that changes is written anew
        self._file = Path(files[0]["filename"]) if files else None
        if not len(self):
            raise RecordError(f"{path}: holds no record; expected at least one")

    def __len__(self) -> int:
        return len(self._data)

    def fingerprint(self) -> dict[str, Any]:
        return {"file": self._path, "rows": len(self), "fingerprint": self._fingerprint}

    def _row(self, index: int) -> Row:
        table = self._data[index : index + 1]
        return {name: table.column(name)[0] for name in self._read}

    def _place(self, index: int) -> tuple[str, int, Path | None]:
        return self._path, index, self._file

    def _index(self, image: CellImage) -> int:
        return image.row


def _loaded(path: str) -> Any:
    import datasets

    try:
        if not path.startswith("hf:"):
            return datasets.load_from_disk(str(Path(path).expanduser()))
        owner, _, name = path.removeprefix("hf:").partition("/")
        name, _, config = name.partition("/")
        if not owner or not name:
            raise RecordError(f"{path}: expected hf:OWNER/NAME, with /CONFIG and :SPLIT where it has several")
        return datasets.load_dataset(f"{owner}/{name}", config or None)
    except RecordError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise unreadable(path, type(error)(reason) if isinstance(error, OSError) else ValueError(reason)) from None


def _split(found: Any, split: str | None, path: str) -> Any:
    """One data set, of several by its name."""
    if not isinstance(found, dict):
        if split is not None:
            raise RecordError(f"{path}: has no splits, got {split!r}")
        return found
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split is None:
        raise RecordError(f"{path}: has splits {', '.join(found)}; name one, as {path}:{next(iter(found))}")
    if split not in found:
        raise RecordError(f"{path}: {unknown('split', split, found)}")
    return found[split]
