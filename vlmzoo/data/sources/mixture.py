"""Several data sets as one: some of them repeated, of some a part, as a YAML file says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmzoo.config import DataConfig, Format, at_least, load
from vlmzoo.data.records import Record, RecordError
from vlmzoo.data.sources.source import Source, checked, file_fingerprint


@dataclass
class Entry:
    """A data set of a mixture. Paths are relative to the mixture's file."""

    path: str
    images: str | None = None
    format: Format | None = None
    weight: float = field(default=1.0, metadata=at_least(0))  # how often each record is seen, on average
    cap: int | None = field(default=None, metadata=at_least(1))  # at most so many records


@dataclass
class Recipe:
    """The data sets of a mixture, in order."""

    sources: list[Entry]


class Mixture(Source):
    """The records of several data sets, one set behind the other.

    Of an entry of n records min(cap, round(weight · n)) are taken: whole passes, and of what remains a subset that is
    spread over all of them and always the same.

    Args:
        opened: opens an entry.

    Raises:
        RecordError: a file that is no mixture, one that holds itself, or an entry that cannot be opened, by its number.
    """

    def __init__(self, file: Path, opened: Callable[[DataConfig], Source]) -> None:
        self._file = file
        entries = _entries(file, ())
        self._sources, self._rests, counts = [], [], []
        for number, entry in enumerate(entries):
            where = f"{file}: sources[{number}]"
            try:
                source = opened(DataConfig(entry.path, entry.images, format=entry.format))
            except (ValueError, OSError) as error:
                raise RecordError(f"{where}: {error}") from None
            count = round(entry.weight * len(source))
            count = count if entry.cap is None else min(count, entry.cap)
            if count < 1:
                raise RecordError(f"{where}: weight {entry.weight} of {len(source)} records leaves none")
            self._sources.append(source)
            self._rests.append(spread(len(source), count % len(source), f"{number} {Path(entry.path).name}"))
            counts.append(count)
        self._ends = np.cumsum(np.array(counts, np.int64))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        number = int(np.searchsorted(self._ends, checked(index, len(self)), side="right"))
        source, begin = self._sources[number], int(self._ends[number - 1]) if number else 0
        passed, place = divmod(index - begin, len(source))
        whole = (int(self._ends[number]) - begin) // len(source)
        return source[place if passed < whole else int(self._rests[number][place])]

    def fingerprint(self) -> dict[str, Any]:
        return file_fingerprint(self._file) | {"sources": [source.fingerprint() for source in self._sources]}

    @property
    def blocks(self) -> np.ndarray | None:
        """Those of the sources that have any; records of the others are blocks of their own."""
        if all(source.blocks is None for source in self._sources):
            return None
        found, begin = [], 0
        for source, rest, end in zip(self._sources, self._rests, self._ends.tolist(), strict=True):
            own = np.arange(1, len(source) + 1) if source.blocks is None else source.blocks
            while begin + len(source) <= end:
                found.append(own + begin)
                begin += len(source)
            if begin < end:  # of the subset, which is in order, those of one block
                ends = np.unique(np.searchsorted(rest, own))
                found.append(ends[ends > 0] + begin)
                begin = end
        return np.concatenate(found)


def spread(length: int, count: int, seed: str) -> np.ndarray:
    """So many of the indices below `length`, in order: one of each of as many equal parts."""
    edges = np.arange(count + 1, dtype=np.int64) * length // max(count, 1)
    random = np.random.default_rng(list(hashlib.sha256(seed.encode()).digest()))
    return edges[:-1] + (random.random(count) * np.diff(edges)).astype(np.int64)


def _entries(file: Path, within: tuple[Path, ...]) -> list[Entry]:
    """The entries of a mixture, with paths that no longer depend on its place; nested ones are looked through."""
    resolved = file.resolve()
    if resolved in within:
        chain = " -> ".join(path.name for path in (*within[within.index(resolved) :], resolved))
        raise RecordError(f"{file}: the mixture holds itself ({chain})")
    try:
        recipe = load(Recipe, file)
    except ValueError as error:
        raise RecordError(str(error)) from None
    if not recipe.sources:
        raise RecordError(f"{file}: holds no source; expected at least one")
    for number, entry in enumerate(recipe.sources):
        entry.path = _beside(file, entry.path)
        entry.images = None if entry.images is None else _beside(file, entry.images)
        if entry.format == "mixture" or (entry.format is None and entry.path.endswith((".yaml", ".yml"))):
            try:
                _entries(Path(entry.path), (*within, resolved))
            except RecordError as error:
                raise RecordError(f"{file}: sources[{number}]: {error}") from None
    return recipe.sources


def _beside(file: Path, path: str) -> str:
    """A path relative to the file; what is none is as it was."""
    return path if "://" in path or path.startswith(("world:", "hf:", "~")) else str(file.parent / path)
