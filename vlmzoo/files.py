"""Files that are there whole or not at all, hashes that tell which, and one process at a time in a folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MANIFEST = "sha256.json"


def write_whole(path: Path, text: str) -> None:
    """Writes beside the file, then renames: a reader or a crash never meets half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None  # a failed write names no file by itself


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
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system said
        shutil.rmtree(place, ignore_errors=True)
        number, said = getattr(error, "errno", None), getattr(error, "strerror", None)
        raise OSError(number, said or str(error), str(path)) from None
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


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the folder for this process; the kernel lets go when the process ends, however it ends.

    Raises:
        ValueError: another process holds it, and we do not wait.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process is working here; wait for it or choose another --out"
            ) from None
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
