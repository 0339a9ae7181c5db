"""Bytes of files on this machine and, by fsspec, anywhere: whole, or the part that is asked for."""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from vlmzoo.data.images import ImageError, ImageFile, image_path
from vlmzoo.data.records import RecordError
from vlmzoo.files import StoredBytes

Place = Path | str
"""A path on this machine, or a URL of one of fsspec's file systems."""

READERS, DISK_READERS = 8, 2  # threads that read at once: behind URLs, where each waits, and on a disk


def place(text: str) -> Place:
    """The path or URL that a text names; `file://` names a path."""
    if "://" not in text:
        return Path(text).expanduser()
    return Path(text.removeprefix("file://")) if text.startswith("file://") else text


def beside(file: Place, name: str) -> Place:
    """What is called `name` in the folder of a file."""
    return file.parent / name if isinstance(file, Path) else f"{file.rpartition('/')[0]}/{name}"


def name_of(file: Place) -> str:
    """The last part of a path or URL."""
    return file.name if isinstance(file, Path) else file.rpartition("/")[2]


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path there.

    Raises:
        OSError: fsspec knows none, or lacks the package for it.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise OSError(str(error).partition("\n")[0]) from None


def readers(file: Place) -> int:
    """How many threads read at once where this file is."""
    return DISK_READERS if isinstance(file, Path) else READERS


def opened(file: Place) -> BinaryIO:
    """The file, to be read from any position."""
    if isinstance(file, Path):
        return file.open("rb")
    system, path = file_system(file)
    return cast(BinaryIO, system.open(path, "rb"))


def read_range(file: Place, start: int, size: int) -> bytes:
    """So many bytes from there on; any thread may read.

    Raises:
        OSError: the file is not there, or ends before.
    """
    if isinstance(file, Path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            found = os.pread(descriptor, size, start)
        finally:
            os.close(descriptor)
    else:
        system, path = file_system(file)
        found = system.cat_file(path, start=start, end=start + size)
    if len(found) != size:
        raise OSError(f"{file} ends before byte {start + size}")
    return found


@dataclass(frozen=True)
class FilePart(StoredBytes):
    """Part of a file, such as a member of an archive."""

    archive: Place
    start: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}@{self.start}"

    def read(self) -> bytes:
        return read_range(self.archive, self.start, self.size)

    @property
    def file(self) -> Path | None:
        return self.archive if isinstance(self.archive, Path) else None


@dataclass(frozen=True)
class UrlFile(StoredBytes):
    """What a URL names."""

    url: str

    def __str__(self) -> str:
        return self.url

    def read(self) -> bytes:
        system, path = file_system(self.url)
        return system.cat_file(path)


class ImageFolder:
    """Where the images of a data set are found by name: a folder, or all URLs below one.

    Args:
        owner: the data set, for messages.
    """

    def __init__(self, folder: Place, owner: str) -> None:
        self._given, self._owner = folder, owner
        self._folder: Place = folder.resolve() if isinstance(folder, Path) else folder.rstrip("/")

    def __call__(self, name: str, where: str) -> ImageFile:
        """The image of this name; one behind a URL is not looked for before it is read.

        Raises:
            ImageError: no such file, or one outside the folder.
            RecordError: there is no such folder.
        """
        if isinstance(self._folder, str):
            path = posixpath.normpath(name)
            if path in (".", "..") or path.startswith(("/", "../")) or "://" in name or "\0" in name:
                raise ImageError(f"{where}: image {name!r} lies outside the image folder {self._folder}")
            return UrlFile(f"{self._folder}/{path}")
        if not self._folder.is_dir():
            raise RecordError(f"{self._owner}: its records have images, but there is no image folder {self._given}")
        return image_path(self._folder, name, where)
