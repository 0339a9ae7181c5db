"""What all data sets are to those who train on them: records by index."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmzoo.data.records import Record, RecordError
from vlmzoo.data.storage import Place, opened
from vlmzoo.files import sha256

END = 1 << 16  # bytes at either end of a file that tell it from others


class Source(ABC):
    """Records by index, which any process and thread may read in any order; each is checked when it is read.

    What a run sees at a step follows from the number of records alone (`vlmzoo.data.order`), and so does where it goes
    on after any end, for any number of processes.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Record:
        """A record, checked; its images are named but not decoded.

        Raises:
            RecordError, ImageError: with the record's name.
        """

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What tells this data from other data, for a run's manifest."""

    @property
    def blocks(self) -> np.ndarray | None:
        """Where runs of records end that are read together, as row groups are; None: each is read by itself."""
        return None


class Limited(Source):
    """The first records of a source."""

    def __init__(self, source: Source, limit: int) -> None:
        self._source, self._limit = source, min(limit, len(source))

    def __len__(self) -> int:
        return self._limit

    def __getitem__(self, index: int) -> Record:
        return self._source[checked(index, self._limit)]

    def fingerprint(self) -> dict[str, Any]:
        return self._source.fingerprint()

    @property
    def blocks(self) -> np.ndarray | None:
        blocks = self._source.blocks
        return None if blocks is None else np.append(blocks[blocks < self._limit], self._limit)


def checked(index: int, length: int) -> int:
    """The index.

    Raises:
        IndexError: no record has it.
    """
    if not 0 <= index < length:
        raise IndexError(f"record {index} of {length}")
    return int(index)


def file_fingerprint(file: Place) -> dict[str, Any]:
    """A file and the SHA-256 of its bytes; of one behind a URL that of its ends."""
    if isinstance(file, Path):
        return {"file": str(file), "sha256": sha256(file)}
    return files_fingerprint(file, [file])


def files_fingerprint(path: Place, files: Sequence[Place]) -> dict[str, Any]:
    """How many files, of how many bytes, and a SHA-256 of their sizes and ends: shards are too large to be read."""
    digest, total = hashlib.sha256(), 0
    for file in files:
        size, ends = file_ends(file)
        digest.update(size.to_bytes(8, "little") + ends)
        total += size
    return {"file": str(path), "files": len(files), "bytes": total, "ends_sha256": digest.hexdigest()}


def file_ends(file: Place) -> tuple[int, bytes]:
    """A file's size, and its first and last bytes."""
    with opened(file) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        head = stream.read(END)
        stream.seek(max(len(head), size - END))
        return size, head + stream.read(END)


def unreadable(file: object, error: Exception) -> RecordError:
    return RecordError(f"{file}: cannot be read ({error})", "unreadable")
