"""Parquet files here or behind URLs, read by row groups: what is read together is seen together."""

from __future__ import annotations

import glob
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np

from vlmzoo.data.order import WINDOW
from vlmzoo.data.records import RecordError
from vlmzoo.data.sources.columns import CellImage, Row, TableSource
from vlmzoo.data.sources.source import files_fingerprint, unreadable
from vlmzoo.data.storage import ImageFolder, Place, beside, file_system, name_of, opened, place

T = TypeVar("T")


class ParquetFiles(TableSource):
    """The rows of one file or of many, in the order of their names.

    Args:
        path: of a file, a folder of them, or a pattern.
        images: where images are that cells only name; None: `images/` beside the first file.

    Raises:
        RecordError: no file, one that is no Parquet, or whose columns hold no conversations.
    """

    def __init__(self, path: str, images: str | None) -> None:
        import pyarrow.parquet  # noqa: F401  # an absent one is told of here

        self._path, self._files = path, matching(path, ".parquet")
        with ThreadPoolExecutor(8) as pool:
            self._footers = list(pool.map(_footer, self._files))
        find = ImageFolder(place(images) if images else beside(self._files[0], "images"), path)
        super().__init__(path, self._footers[0].schema.to_arrow_schema().names, find)
        for file, footer in zip(self._files, self._footers, strict=True):
            if missing := set(self._read) - set(footer.schema.to_arrow_schema().names):
                raise RecordError(f"{file}: lacks the column {sorted(missing)[0]!r}, which {self._files[0]} has")
        groups = [(number, group) for number, f in enumerate(self._footers) for group in range(f.num_row_groups)]
        self._groups = np.array(groups, np.int64).reshape(-1, 2)
        rows = [self._footers[number].row_group(group).num_rows for number, group in groups]
        self._ends = np.cumsum(np.array(rows, np.int64))
        self._file_ends = np.cumsum([footer.num_rows for footer in self._footers])
        if not len(self):
            raise RecordError(f"{path}: holds no record; expected at least one")
        mean = len(self) / len(self._groups)
        self._held = Latest(self._load, 2 * max(1, round(WINDOW / mean + 0.5)))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def blocks(self) -> np.ndarray | None:
        return self._ends

    def fingerprint(self) -> dict[str, Any]:
        return files_fingerprint(self._path, self._files)

    def _load(self, block: int) -> Any:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        number, group = self._groups[block].tolist()
        try:
            with opened(self._files[number]) as stream:
                file = ParquetFile(stream, metadata=self._footers[number])
                return file.read_row_group(group, columns=self._read, use_threads=False)
        except (OSError, pyarrow.ArrowException) as error:
            raise unreadable(self._files[number], error) from None

    def _row(self, index: int) -> Row:
        block = int(np.searchsorted(self._ends, index, side="right"))
        table = self._held[block]
        row = index - (int(self._ends[block - 1]) if block else 0)
        return {name: table.column(name)[row] for name in self._read}

    def _place(self, index: int) -> tuple[str, int, Path | None]:
        number = int(np.searchsorted(self._file_ends, index, side="right"))
        file = self._files[number]
        return str(file), index - self._begin(number), file if isinstance(file, Path) else None

    def _index(self, image: CellImage) -> int:
        number = next(number for number, file in enumerate(self._files) if str(file) == image.table)
        return self._begin(number) + image.row

    def _begin(self, number: int) -> int:
        return int(self._file_ends[number - 1]) if number else 0


def _footer(file: Place) -> Any:
    import pyarrow
    from pyarrow.parquet import read_metadata

    try:
        with opened(file) as stream:
            return read_metadata(stream)
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(file, error) from None


def matching(path: str, ending: str) -> list[Place]:
    """The files that a path, a folder's or a pattern names, in the order of their names.

    Raises:
        RecordError: there is none.
    """
    found: list[Place]
    where = place(path)
    if isinstance(where, Path):
        pattern = str(where / f"*{ending}") if where.is_dir() else str(where)
        found = [where] if where.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
    else:
        try:
            system, inside = file_system(where)
            pattern = inside if inside.endswith(ending) else f"{inside.rstrip('/')}/*{ending}"
            found = sorted(system.unstrip_protocol(file) for file in system.glob(pattern))
        except OSError as error:
            raise unreadable(path, error) from None
    if not found:
        raise RecordError(f"{path}: no such file; expected {name_of(where) if '*' in path else f'*{ending}'}")
    return found


class Latest(Generic[T]):
    """What was loaded last, by number; any thread may ask, and what two ask for is loaded once."""

    def __init__(self, load: Callable[[int], T], keep: int) -> None:
        self._load, self._keep, self._lock = load, keep, Lock()
        self._held: OrderedDict[int, Future[T]] = OrderedDict()

    def __getitem__(self, number: int) -> T:
        with self._lock:
            asked = self._held.get(number)
            ours = asked is None
            if asked is None:
                asked = self._held[number] = Future()
            self._held.move_to_end(number)
            while len(self._held) > self._keep:
                self._held.popitem(last=False)
        if ours:
            try:
                asked.set_result(self._load(number))
            except BaseException as error:
                with self._lock:
                    self._held.pop(number, None)
                asked.set_exception(error)
        return asked.result()
