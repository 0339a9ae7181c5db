"""Fetches a published set, and verifies that what is there is what was published."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from vlmzoo.data.published.recipes import Recipe, RemoteFile
from vlmzoo.data.sources.scan import json_lines, json_list
from vlmzoo.files import locked, sha256, whole_file, write_whole

IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")


@dataclass(frozen=True)
class Verified:
    """Something that was looked for, and what is wrong with it; None: nothing."""

    what: str
    fault: str | None = None


def fetch(recipe: Recipe, folder: Path) -> None:
    """Downloads and unpacks what is not there yet; called again, it goes on where it stopped.

    Raises:
        ValueError: a file that cannot be had (without a network, for one), an archive that is none, or another process
            fetches into the folder.
    """
    with locked(folder):
        for file in recipe.files:
            if file.unpack is not None and _unpacked(folder, file).is_file():
                continue
            if "*" in file.path or not (folder / file.path).is_file():  # of several files the hub knows what lacks
                _download(file, folder)
            if file.unpack is not None:
                _unpack(folder / file.path, folder / file.unpack)
                write_whole(_unpacked(folder, file), "")


def verify(recipe: Recipe, folder: Path) -> Iterator[Verified]:
    """Every file, count and hash of the recipe, one after the other."""
    for file in recipe.files:
        if file.unpack is None:
            yield from _verify_file(file, folder)
        elif not (folder / file.unpack).is_dir():
            yield Verified(file.unpack, f"no such folder; {file.path} is unpacked into it")
    for name, expected in recipe.images.items():
        found = sum(_is_image(entry) for _, _, files in os.walk(folder / name) for entry in files)
        fault = None if found == expected or (found and expected is None) else f"{found:,} images"
        wanted = "" if expected is None or fault is None else f", expected {expected:,}"
        yield Verified(f"{name}: images" if fault else f"{name}: {found:,} images", fault and f"{fault}{wanted}")


def _verify_file(file: RemoteFile, folder: Path) -> Iterator[Verified]:
    found = sorted(folder.glob(file.path))
    if not found:
        yield Verified(file.path, "no such file")
        return
    if file.sha256 is not None:
        digest = sha256(found[0])
        fault = f"SHA-256 {digest[:12]}…, expected {file.sha256[:12]}…" if digest != file.sha256 else None
        yield Verified(f"{file.path}: hash", fault)
    if file.records is not None:
        try:
            number = _num_records(found[0])
        except ValueError as error:
            yield Verified(f"{file.path}: records", f"cannot be read ({error})")
            return
        fault = None if number == file.records else f"{number:,}, expected {file.records:,}"
        yield Verified(f"{file.path}: {file.records:,} records" if fault is None else f"{file.path}: records", fault)
    if file.sha256 is None and file.records is None:
        yield Verified(f"{file.path}: there; neither its hash nor its count is known")


def _num_records(file: Path) -> int:
    with file.open(encoding="utf-8") as opened:
        if opened.read(64).lstrip().startswith("{"):
            opened.seek(0)
            return len(json.load(opened))
    if file.suffix == ".jsonl":
        return len(json_lines(file)) - 1
    bounds, end = json_list(file)
    if end == -1:
        raise ValueError("it ends within a record")
    return len(bounds) - 1


def _download(file: RemoteFile, folder: Path) -> None:
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import logging

    place, said = folder / file.path, logging.get_verbosity()
    logging.set_verbosity(50)  # what it says of a network that is not there is in our error
    try:
        if file.repo is not None:
            huggingface_hub.snapshot_download(
                file.repo, repo_type="dataset", allow_patterns=[file.path], local_dir=folder
            )
        elif file.url is not None:
            part = place.with_name(f".{place.name}.part")
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("ab") as opened:
                http_get(file.url, opened, resume_size=opened.tell())
            part.replace(place)
    except (OSError, ValueError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{file.path}: {file.url or file.repo} gave nothing ({first or type(error).__name__})"
        ) from error
    finally:
        logging.set_verbosity(said)
    if not any(folder.glob(file.path)):
        raise ValueError(f"{file.path}: {file.url or file.repo} gave nothing; expected it in {folder}")


def _unpacked(folder: Path, file: RemoteFile) -> Path:
    """What is written when an archive has been unpacked: the archive may go then."""
    place = folder / file.path
    return place.with_name(f".{place.name}.unpacked")


def _unpack(archive: Path, folder: Path) -> None:
    """Each member whole, under its own name below the folder; those that are there stay.

    Raises:
        ValueError: no ZIP, a damaged one, or a member that would lie outside the folder.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            inside = folder.resolve()
            bar = tqdm(members, desc=archive.name, unit="file", file=sys.stderr, disable=not sys.stderr.isatty())
            for member in bar:
                place = (inside / member.filename).resolve()
                if not place.is_relative_to(inside):
                    raise ValueError(f"{archive}: its member {member.filename!r} lies outside the folder")
                if place.is_file() and place.stat().st_size == member.file_size:
                    continue
                with whole_file(place) as aside, opened.open(member) as source, aside.open("wb") as target:
                    shutil.copyfileobj(source, target)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive}: cannot be unpacked ({error}); delete it to fetch it again") from None


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGES)
