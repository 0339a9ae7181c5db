"""Run and sweep directories: a file is there whole or not at all, and one process at a time works in a folder."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Writes beside the file, then renames: a reader or a crash never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
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


def read_result(folder: Path, config_hash: str) -> dict[str, Any] | None:
    """The result.json of a run that ended with exactly this configuration; None: not done."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return result if isinstance(result, dict) and result.get("config_hash") == config_hash else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; the kernel lets go when the process ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process is working here; wait for it or choose another --out"
            ) from None
        yield
