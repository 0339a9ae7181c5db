"""Every answer written down once, so that a run that was killed goes on where it stood.

A line is JSON and goes to the system in one write as soon as the answer is there: a killed process loses only what it
had asked and not yet been told. The file is synced every SYNC answers or seconds, which is what a machine that loses
its power can lose.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

SYNC = 256  # answers
SYNC_SECONDS = 2.0


class JournalError(ValueError):
    """A journal that cannot be read; the message names the line."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One answer, or why there is none (`failed`)."""

    key: str
    image: int
    kind: str
    text: str = ""
    failed: str = ""
    input_tokens: int = 0
    output_tokens: int = 0


def key_of(*parts: object) -> str:
    """What makes two requests the same, as 16 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


class Journal:
    """A file of entries, one process at a time; memory is 16 bytes an entry."""

    def __init__(self, path: Path) -> None:
        """Opens or begins the file; a last line that a kill cut short is cut off.

        Raises:
            JournalError: another line is broken, and so the file is not ours or damaged.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.input_tokens = self.output_tokens = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._index()
        except BaseException:
            os.close(self._file)
            raise
        self._unsynced, self._synced = 0, time.monotonic()

    def _index(self) -> None:
        keys, places, at = array("Q"), array("q"), 0
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = Entry(**json.loads(line))
                    keys.append(int(entry.key, 16))
                    self.input_tokens += entry.input_tokens
                    self.output_tokens += entry.output_tokens
                except (ValueError, TypeError, OverflowError):
                    raise JournalError(
                        f"{self.path}: line {number} is no entry of a journal; the file is damaged"
                    ) from None
                places.append(at)
                at += len(line)
        os.ftruncate(self._file, at)
        self._end = os.lseek(self._file, at, os.SEEK_SET)
        self._keys, self._places = keys, places
        self._sort()

    def _sort(self) -> None:
        keys = np.frombuffer(self._keys, np.uint64) if self._keys else np.empty(0, np.uint64)
        self._order = np.argsort(keys, kind="stable").astype(np.int32)
        self._sorted = keys[self._order]

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: str) -> bool:
        """Whether it was there when the journal was opened, or last read."""
        return self._row(key) is not None

    def write(self, entry: Entry) -> None:
        line = json.dumps(asdict(entry), ensure_ascii=True).encode() + b"\n"
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._keys.append(int(entry.key, 16))
        self._places.append(self._end)
        self._end += len(line)
        self.input_tokens += entry.input_tokens
        self.output_tokens += entry.output_tokens
        self._unsynced += 1
        if self._unsynced >= SYNC or time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        os.fsync(self._file)
        self._unsynced, self._synced = 0, time.monotonic()

    def read(self, keys: Iterator[str]) -> Iterator[Entry | None]:
        """The entries of keys, in their order; None where there is none."""
        self._sort()
        for key in keys:
            row = self._row(key)
            yield None if row is None else self._entry(row)

    def _row(self, key: str) -> int | None:
        value = np.uint64(int(key, 16))
        place = int(np.searchsorted(self._sorted, value))
        return int(self._order[place]) if place < len(self._sorted) and self._sorted[place] == value else None

    def _entry(self, row: int) -> Entry:
        begin = self._places[row]
        end = self._places[row + 1] if row + 1 < len(self._places) else self._end
        return Entry(**json.loads(os.pread(self._file, end - begin, begin)))

    def close(self) -> None:
        self.sync()
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
