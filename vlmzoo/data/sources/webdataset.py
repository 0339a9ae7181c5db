"""WebDataset's shards: tar files whose members of one name make a record, found once and read by their bytes."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vlmzoo.data.records import Record, RecordError, to_record
from vlmzoo.data.sources.captions import IMAGES
from vlmzoo.data.sources.llava import LARGE
from vlmzoo.data.sources.packed import Texts, caption
from vlmzoo.data.sources.parquet import matching
from vlmzoo.data.sources.source import Source, checked, file_ends, files_fingerprint, unreadable
from vlmzoo.data.sources.tar import Members, OddError, any_members, plain_members
from vlmzoo.data.storage import FilePart, Place, name_of, opened, read_range, readers
from vlmzoo.files import computed_once

TALK, CAPTION, IMAGE, NOTHING = range(4)
TEXTS = {".json": TALK, ".txt": CAPTION}


class WebDataset(Source):
    """Records of tar shards: `KEY.json`, or the caption `KEY.txt`, and the images `KEY.jpg`, `KEY.1.png`, …

    A JSON is LLaVA's record; its n-th image is the n-th in the shard, whatever `image` calls it. One without
    `conversations`, as img2dataset writes, leaves the word to the caption.

    Args:
        path: of a shard, a folder of them, a pattern, or several as `shard-{000..009}.tar`.
        cache: where the index is kept, of shards that are large together.

    Raises:
        RecordError: no shard, a damaged one, or no record in any.
    """

    def __init__(self, path: str, cache: Path) -> None:
        self._path = path
        self._shards = [file for part in braces(path) for file in matching(part, ".tar")]
        try:
            found = self._kept(cache)
        except OSError as error:
            raise unreadable(path, error) from None
        self._starts, self._sizes, self._kinds = found["starts"], found["sizes"], found["kinds"]
        self._members = found["members"]  # where a record's end, (records + 1,)
        self._records = found["records"]  # where a shard's end
        self._keys = Texts(found["keys"], found["key_bounds"])
        if not len(self):
            raise RecordError(f"{path}: holds no record; expected members such as 000.jpg and 000.txt")

    def __len__(self) -> int:
        return len(self._members) - 1

    def __getitem__(self, index: int) -> Record:
        shard = int(np.searchsorted(self._records, checked(index, len(self)), side="right"))
        file, key = self._shards[shard], self._keys[index]
        number = index - (int(self._records[shard - 1]) if shard else 0)
        where = f"{name_of(file)}[{number}]"
        images, texts = [], {}
        for member in range(int(self._members[index]), int(self._members[index + 1])):
            start, size = int(self._starts[member]), int(self._sizes[member])
            if (kind := int(self._kinds[member])) == IMAGE:
                images.append(FilePart(file, start, size, f"{key}#{len(images)}"))
            else:
                texts[kind] = (start, size)
        value = self._value(file, f"{where} (id {key!r})", key, texts)
        if isinstance(value, dict):
            value = {"id": key, **value, "image": images}
        return to_record(value, where, key, _unnamed)

    def fingerprint(self) -> dict[str, Any]:
        return files_fingerprint(self._path, self._shards)

    def _value(self, file: Place, where: str, key: str, texts: dict[int, tuple[int, int]]) -> Any:
        try:
            if TALK in texts:
                value = json.loads(read_range(file, *texts[TALK]).decode("utf-8"))
                if not isinstance(value, dict) or "conversations" in value or CAPTION not in texts:
                    return value
            if CAPTION in texts:
                return caption(key, [], read_range(file, *texts[CAPTION]).decode("utf-8").strip())
        except json.JSONDecodeError as error:
            raise RecordError(f"{where}: its .json is not valid JSON: {error.msg}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecordError(f"{where}: cannot be read ({error})") from None
        raise RecordError(f"{where}: has neither .json nor .txt")

    def _kept(self, cache: Path) -> dict[str, np.ndarray]:
        """The index; that of large shards from the cache, where their paths, sizes, times and ends are the key."""
        stamps, total = [], 0
        for file in self._shards:
            size, ends = file_ends(file)
            time = file.stat().st_mtime_ns if isinstance(file, Path) else None
            name = str(file.resolve() if isinstance(file, Path) else file)
            stamps.append([name, size, time, hashlib.sha256(ends).hexdigest()])
            total += size
        if total < LARGE:
            return _index(self._shards)
        place = cache / hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]

        def write(folder: Path) -> None:
            for name, values in _index(self._shards).items():
                np.save(folder / f"{name}.npy", values, allow_pickle=False)

        computed_once(place, write, "index")
        return {file.stem: np.load(file, allow_pickle=False) for file in place.glob("*.npy")}


def _unnamed(name: str, where: str) -> Any:
    raise AssertionError(f"{where}: images of shards are found by their bytes, not as {name}")


def braces(path: str) -> list[str]:
    """`a-{00..11}.tar` as its twelve names; others as they are."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if found is None:
        return [path]
    first, last = found.groups()
    if int(first) > int(last):
        raise RecordError(f"{path}: {found.group()} counts down; expected the lower number first")
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [name for number in numbers for name in braces(path[: found.start()] + number + path[found.end() :])]


def _index(shards: list[Place]) -> dict[str, np.ndarray]:
    """Where every member stands, which record has it, and what records are called; packed."""
    with ThreadPoolExecutor(readers(shards[0])) as pool:
        parts = list(pool.map(_shard_index, shards))
    found = {name: np.concatenate([part[name] for part in parts]) for name in ("starts", "sizes", "kinds", "keys")}
    found["records"] = np.cumsum([len(part["members"]) for part in parts])
    for ends, of in (("members", "starts"), ("key_bounds", "keys")):
        begins = np.cumsum([0, *(len(part[of]) for part in parts)])
        moved = [part[ends] + begin for part, begin in zip(parts, begins, strict=False)]
        found[ends] = np.concatenate([np.zeros(1, np.int64), *moved])
    return found


def _shard_index(shard: Place) -> dict[str, np.ndarray]:
    """The same of one shard; bounds are ends alone.

    Raises:
        RecordError: it is no tar file, or a damaged one.
    """
    for members in (plain_members, any_members):
        try:
            with opened(shard) as stream:
                return _packed(members(stream))
        except OddError:
            continue
        except (tarfile.TarError, EOFError, ValueError, OSError) as error:
            raise RecordError(f"{shard}: damaged, or no tar file ({error})") from None
    raise AssertionError("any_members raises no OddError")


def _packed(found: Iterable[Members]) -> dict[str, np.ndarray]:
    """The same of these members: those of one key that stand together make a record."""
    parts, texts = [(np.zeros(0, np.int64),) * 5], bytearray()
    last, number = None, 0
    for names, starts, sizes in found:
        keys, kinds = _keys_and_kinds(names)
        if not (used := kinds != NOTHING).all():
            keys, kinds, starts, sizes = keys[used], kinds[used], starts[used], sizes[used]
        if not len(keys):
            continue
        new = np.append(keys[0] != last, keys[1:] != keys[:-1])
        records = keys[new].tolist()
        texts += b"".join(records)
        parts.append((starts, sizes, kinds, np.flatnonzero(new) + number, np.array(list(map(len, records)))))
        last, number = keys[-1], number + len(keys)
    starts, sizes, kinds, firsts, lengths = map(np.concatenate, zip(*parts, strict=True))
    return {
        "starts": starts,
        "sizes": sizes,
        "kinds": kinds.astype(np.uint8),
        "members": np.append(firsts, number)[1:],
        "keys": np.frombuffer(bytes(texts), np.uint8),
        "key_bounds": np.cumsum(lengths),
    }


def _keys_and_kinds(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each name what is before the first dot of its last part (`S`), and what a member is that is called so."""
    width = names.itemsize
    letters, columns = names.view(np.uint8).reshape(-1, width), np.arange(width, dtype=np.int32)
    dots = letters == ord(".")
    if (slashes := letters == ord("/")).any():
        behind = width - slashes[:, ::-1].argmax(1)
        dots &= columns >= np.where(slashes.any(1), behind, 0)[:, None]
    dot = np.where(dots.any(1), dots.argmax(1), width).astype(np.int32)
    keys = letters * (columns < dot[:, None])
    endings = (letters - keys).view(f"S{width}")[:, 0]  # zeros before them
    kinds = np.fromiter(map(_kind, endings.tolist()), np.uint8, len(names))
    return keys.view(f"S{width}")[:, 0], kinds


@lru_cache  # a few endings, asked for by every member
def _kind(ending: bytes) -> int:
    """What a member with this ending, from the dot on and behind zeros, is to its record."""
    text = ending.lstrip(b"\0").decode(errors="replace").lower()
    return IMAGE if text.endswith(IMAGES) else TEXTS.get(text, NOTHING)
