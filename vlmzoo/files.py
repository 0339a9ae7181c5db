"""Files that are there whole or not at all, hashes that tell which, and one process at a time in a folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from tqdm import tqdm

MANIFEST = "sha256.json"
SETTLED = 2 * 10**9  # nanoseconds after a change within which another may bear the same time
HASHES = 65536  # files between two writings of their hashes


class StoredBytes(ABC):
    """Bytes that have no file of their own: part of an archive, a cell of a table, what a URL names.

    Equal ones are the same bytes; `str` names them in messages, and tells them from all others.
    """

    @abstractmethod
    def read(self) -> bytes:
        """All of them; any thread may ask.

        Raises:
            OSError: they are not there, or not all of them.
        """

    @property
    def file(self) -> Path | None:
        """The file on this machine that they are part of: while it stays as it is, so do they."""
        return None

    @property
    def in_block(self) -> bool:
        """Whether reading them reads those beside them too, so that all are best read in their order."""
        return False


F = TypeVar("F", bound=Path | StoredBytes)


@contextmanager
def whole_file(path: Path, *, alone: bool = False) -> Iterator[Path]:
    """A file to write, synced and renamed to `path` once it is whole: a reader or a crash never meets half of it.

    Args:
        alone: the caller holds a lock, so that it writes over what a killed process left.

    Raises:
        OSError: it could not be written (a full disk, no right to); what stood at `path` still does.
    """
    aside = path.with_name(f".{path.name}" if alone else f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:  # a failed write names no file by itself
        aside.unlink(missing_ok=True)
        raise _named(error, path) from None
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    write_whole(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `path` once it is whole, with a manifest of its files' hashes.

    One process at a time: hold a lock.

    Raises:
        OSError: it could not be written (a full disk, no right to); nothing stands at `path` then.
    """
    place = staging(path)
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        yield place
        files = sorted(file for file in place.rglob("*") if file.is_file())
        hashes = {file.relative_to(place).as_posix(): sha256(file) for file in files}
        (place / MANIFEST).write_text(json.dumps(hashes, indent=1))
        for file in place.rglob("*"):
            _sync(file)
        _sync(place)
        shutil.rmtree(path, ignore_errors=True)
        place.rename(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(place, ignore_errors=True)
        raise _named(error, path) from None
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def staging(path: Path) -> Path:
    """Where `whole_folder` fills what becomes `path`: one name, so that what a killed process left is removed."""
    return path.with_name(f".{path.name}")


def computed_once(path: Path, compute: Callable[[Path], None], name: str) -> None:
    """A folder that `compute` fills where it is not there; a damaged one is computed again, with a message.

    Of several processes at once one computes, and the others wait for it.
    """
    with locked(path.with_suffix(".lock"), wait=True):
        if path.exists() and (fault := damage(path)) is not None:
            print(f"{name}: {fault}; computing it again", file=sys.stderr)
            shutil.rmtree(path)
        if not path.exists():
            with whole_folder(path) as aside:
                compute(aside)


def damage(path: Path) -> str | None:
    """What is wrong with a folder that `whole_folder` wrote; None: nothing."""
    try:
        hashes = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{path}: its {MANIFEST} is missing or broken"
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file() or sha256(file) != expected:
            return f"{file}: does not match its hash"
    return None


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def content_hashes(files: Iterable[F], folder: Path) -> dict[F, str]:
    """SHA-256 of each file's bytes, or of stored bytes; while files stay as they are, theirs are kept in `folder`.

    A file is taken for the one that was hashed while its size and its times of change (of the content, and of the
    inode, which no tool sets back) are the same, to the nanosecond. One that changed moments before it was hashed is
    read again the next time: a clock may be too coarse to tell a second change from the first. Stored bytes stand with
    the file that they are part of; those that are part of none are read every time.
    """
    paths = list(dict.fromkeys(files))
    index = folder / f"{hashlib.sha256(json.dumps(sorted(map(str, paths))).encode()).hexdigest()[:16]}.json"
    stamps = {path: _stamp(path) for path in paths}
    known = _known(index, stamps)
    if len(known) < len(paths):
        with held(index.with_suffix(".lock"), wait=True):  # who waited for another finds its hashes
            known = _known(index, stamps)
            _hash(known, stamps, index)
    return {path: known[path] for path in paths}


def _hash(known: dict[F, str], stamps: dict[F, list[int] | None], index: Path) -> None:
    """Adds the hashes of all files that lack one, and writes down those that can be believed later."""
    unknown = [path for path in stamps if path not in known]
    settled = time.time_ns() - SETTLED
    bar = tqdm(total=len(unknown), desc="hashes", unit="file", file=sys.stderr, disable=not sys.stderr.isatty())
    with bar, ThreadPoolExecutor() as pool:
        for start in range(0, len(unknown), HASHES):  # written as it goes: killed here, only these are lost
            part = unknown[start : start + HASHES]
            for path, digest in zip(part, pool.map(_content_hash, part), strict=True):
                known[path] = digest
                bar.update()
            stood = ((path, stamp) for path in known if (stamp := stamps[path]) and max(stamp[1:]) < settled)
            kept = {str(path): [known[path], *stamp] for path, stamp in stood}
            write_whole(index, json.dumps(kept))


def _content_hash(path: Path | StoredBytes) -> str:
    return sha256(path) if isinstance(path, Path) else hashlib.sha256(path.read()).hexdigest()


def _stamp(path: Path | StoredBytes) -> list[int] | None:
    """Size and times of change of a file, or of the one that bytes are part of; None: of none."""
    file = path if isinstance(path, Path) else path.file
    if file is None:
        return None
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _known(index: Path, stamps: dict[F, list[int] | None]) -> dict[F, str]:
    """The hashes of files that are as they were; none where the index is not there or broken."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        return {path: found[str(path)][0] for path in stamps if found.get(str(path), [""])[1:] == stamps[path]}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


@contextmanager
def held(file: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a lock file for this process; the kernel lets go when the process ends, however it ends.

    Gives False where another holds it, and we do not wait.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = file.open("w")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.parent)) from None
    with opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the folder for this process.

    Raises:
        ValueError: another process holds it, and we do not wait.
    """
    with held(folder / ".lock", wait=wait) as ours:
        if not ours:
            raise ValueError(f"{folder}: another process is working here; wait for it or choose another --out")
        yield


def _named(error: Exception, path: Path) -> OSError:
    """The error with the file that it is about; safetensors wraps what the system said."""
    return OSError(getattr(error, "errno", None), getattr(error, "strerror", None) or str(error), str(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
