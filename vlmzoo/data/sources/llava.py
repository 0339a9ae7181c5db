"""LLaVA's JSON and JSON lines: records are found in the file when it is opened, and parsed when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlmzoo.data.records import Record, RecordError, to_record
from vlmzoo.data.sources.scan import CHUNK, json_lines, json_list
from vlmzoo.data.sources.source import Source, checked, file_ends, file_fingerprint, unreadable
from vlmzoo.data.storage import ImageFolder, Place, beside, name_of, opened, place, read_range
from vlmzoo.files import computed_once

LARGE = 1 << 26  # bytes: from here on the index is kept


class LlavaFile(Source):
    """The records of a LLaVA JSON file, or of one with a record a line.

    A record's `image` is a path below the image folder, or a list of several. One without `id` is known by its index.

    Args:
        images: a folder or URL; None: `images/` beside the file.
        cache: where the indexes of large files are kept.

    Raises:
        RecordError: a file that is no JSON list or holds no record.
    """

    def __init__(self, file: Place, images: str | None, cache: Path) -> None:
        self._file = file
        self._lines = name_of(file).endswith(".jsonl")
        self._find = ImageFolder(place(images) if images else beside(file, "images"), str(file))
        try:
            self._bounds = _kept(file, cache, self._index)
        except FileNotFoundError:
            raise RecordError(f"{file}: no such file; expected LLaVA JSON", "unreadable") from None
        except OSError as error:
            raise unreadable(file, error) from None
        if len(self) < 1 or (not self._lines and len(self) == 1 and self._is_empty()):
            raise RecordError(f"{file}: holds no record; expected at least one")

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Record:
        checked(index, len(self))
        return to_record(self.value(index), f"{name_of(self._file)}[{index}]", str(index), self._find)

    def fingerprint(self) -> dict[str, Any]:
        return file_fingerprint(self._file)

    def _slice(self, index: int) -> bytes:
        start, end = int(self._bounds[index]), int(self._bounds[index + 1])
        try:
            return read_range(self._file, start, end - start - (not self._lines))
        except OSError as error:
            raise unreadable(self._file, error) from None

    def value(self, index: int) -> Any:
        """A record as it stands in the file.

        Raises:
            RecordError: it is no JSON, or none that Python's decoder takes.
        """
        where, start = f"{name_of(self._file)}[{index}]", int(self._bounds[index])
        try:
            text = self._slice(index).decode("utf-8")
            return json.loads(text.rstrip("\r\n") if self._lines else text)
        except UnicodeDecodeError as error:
            raise RecordError(f"{where}: cannot be read ({error})") from None
        except json.JSONDecodeError as error:
            line = self._line(start) + error.lineno - 1
            raise RecordError(f"{where}: not valid JSON at line {line}: {error.msg}") from None
        except (RecursionError, ValueError):  # as Python's decoder refuses what JSON allows
            raise RecordError(f"{where}: nested too deeply, or holds a number of thousands of digits") from None

    def _line(self, place: int) -> int:
        """The number of the line that a byte is in."""
        line = 1
        with opened(self._file) as stream:
            while place > 0:
                line += stream.read(min(CHUNK, place)).count(b"\n")
                place -= CHUNK
        return line

    def _invalid(self, start: int, lines: int, message: str) -> RecordError:
        """The file is not JSON so many lines behind this byte."""
        return RecordError(f"{self._file}: not valid JSON at line {self._line(start) + lines}: {message}")

    def _is_empty(self) -> bool:
        return not self._slice(0).strip()

    def _index(self) -> np.ndarray:
        if self._lines:
            return json_lines(self._file)
        with opened(self._file) as stream:
            head = stream.read(CHUNK)
        if not head.lstrip().startswith(b"["):
            raise self._no_list(head)
        bounds, end = json_list(self._file)
        if end == -1:  # what was not closed is in the last element
            self._bounds = np.append(bounds, file_ends(self._file)[0] + 1)
            for index in range(len(bounds)):
                self.value(index)
            raise self._invalid(int(bounds[-1]), 0, "Expecting ',' delimiter")
        with opened(self._file) as stream:
            stream.seek(end - 1)
            if stream.read(1) != b"]":
                raise self._invalid(end, 0, "Expecting ',' delimiter")
            behind = stream.read()
            if behind.strip():
                lines = behind[: len(behind) - len(behind.lstrip())].count(b"\n")
                raise self._invalid(end, lines, "Extra data")
        return bounds

    def _no_list(self, head: bytes) -> RecordError:
        """What the file is instead, by how it begins."""
        kinds = {"{": "an object", '"': "a text", "n": "nothing", "t": "true or false", "f": "true or false"}
        try:
            text = head.decode("utf-8", errors="strict" if len(head) < CHUNK else "ignore").lstrip()
        except UnicodeDecodeError as error:
            return unreadable(self._file, error)
        if text[:1] in kinds or text[:1].isdigit():
            kind = kinds.get(text[:1], "a number")
            return RecordError(f"{self._file}: expected a list of records, got {kind}")
        return self._invalid(0, 0, "Expecting value")


def _kept(file: Place, cache: Path, index: Callable[[], np.ndarray]) -> np.ndarray:
    """The index of a file; that of a large one from the cache, where its path, size, time and ends are the key."""
    size, ends = file_ends(file)
    if size < LARGE:
        return index()
    time = file.stat().st_mtime_ns if isinstance(file, Path) else None
    name = str(file.resolve() if isinstance(file, Path) else file)
    key = hashlib.sha256(json.dumps([name, size, time, hashlib.sha256(ends).hexdigest()]).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        np.save(folder / "bounds.npy", index(), allow_pickle=False)

    computed_once(cache / key, write, "index")
    return np.load(cache / key / "bounds.npy", allow_pickle=False)
