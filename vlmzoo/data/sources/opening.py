"""Which kind of data set a path names, and that opened."""

from __future__ import annotations

import glob
from collections.abc import Callable
from pathlib import Path

from vlmzoo.config import DataConfig, Format
from vlmzoo.data.records import RecordError
from vlmzoo.data.sources.source import Limited, Source
from vlmzoo.data.storage import Place, place

ENDINGS: dict[str, Format] = {
    ".json": "llava",
    ".jsonl": "llava",
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".yaml": "mixture",
    ".yml": "mixture",
}
SPLIT: tuple[Format, ...] = ("huggingface", "coco", "scienceqa")
KINDS = (
    "x.json or x.jsonl (LLaVA), *.parquet, hf:OWNER/NAME, a folder of datasets.save_to_disk, x-{000..009}.tar or a "
    "folder of .tar, of .parquet, of images with captions, of COCO's or ScienceQA's, a mixture x.yaml, world:NAME"
)


def open_source(config: DataConfig, cache: Path, opened: Callable[[DataConfig], Source]) -> Source:
    """The records of a data set, in whatever form they are kept.

    Args:
        cache: where what is found out about large files is kept.
        opened: opens the data sets that a mixture names.

    Raises:
        RecordError: a data set that cannot be opened, or of no kind that is known.
    """
    if config.limit is not None and config.limit < 1:
        raise RecordError(f"{config.path}: limit {config.limit} leaves no record; expected at least 1")
    try:
        source = _open(config, cache, opened)
    except ModuleNotFoundError as error:
        if error.name not in ("pyarrow", "datasets"):
            raise
        raise RecordError(f"{config.path}: needs {error.name}, got none; pip install 'vlmzoo[data]'") from None
    return source if config.limit is None else Limited(source, config.limit)


def _open(config: DataConfig, cache: Path, opened: Callable[[DataConfig], Source]) -> Source:
    path, split = split_of(config.path)
    found = config.format or kind(path)
    if split is not None and found not in SPLIT:
        raise RecordError(f"{config.path}: {found} has no splits, got {split!r}")
    match found:
        case "llava":
            from vlmzoo.data.sources.llava import LlavaFile

            return LlavaFile(place(path), config.images, cache)
        case "parquet":
            from vlmzoo.data.sources.parquet import ParquetFiles

            return ParquetFiles(path, config.images)
        case "huggingface":
            from vlmzoo.data.sources.hub import HubDataset

            return HubDataset(path, split, config.images)
        case "webdataset":
            from vlmzoo.data.sources.webdataset import WebDataset

            return WebDataset(path, cache)
        case "captions":
            from vlmzoo.data.sources.captions import open_captions

            return open_captions(_here(path), config.images)
        case "coco":
            from vlmzoo.data.sources.coco import open_coco

            return open_coco(_here(path), split, config.images)
        case "scienceqa":
            from vlmzoo.data.sources.scienceqa import open_scienceqa

            return open_scienceqa(_here(path), split, config.images)
        case "mixture":
            from vlmzoo.data.sources.mixture import Mixture

            return Mixture(_here(path), opened)


def split_of(path: str) -> tuple[str, str | None]:
    """A path and the split behind its last colon, where it names one: `hf:OWNER/NAME:train`, `FOLDER:train`."""
    before, colon, split = path.rpartition(":")
    named = colon and (before.startswith("hf:") or (Path(before).expanduser().is_dir() and not Path(path).exists()))
    return (before, split) if named else (path, None)


def kind(path: str) -> Format:
    """The kind of data set that a path names, without its split: by its ending, or by what stands in the folder.

    Raises:
        RecordError: none is known.
    """
    if path.startswith("hf:"):
        return "huggingface"
    for ending, found in ENDINGS.items():
        if path.endswith(ending):
            return found
    folder = place(path)
    if isinstance(folder, Path) and folder.is_dir() and (found := _of_folder(folder)) is not None:
        return found
    fault = "no such file or folder" if isinstance(folder, Path) and not folder.exists() else "of no kind that is known"
    raise RecordError(f"{path}: {fault}; expected {KINDS}, or its `format`")


def _of_folder(folder: Path) -> Format | None:
    from vlmzoo.data.sources.captions import is_captions

    marks: list[tuple[Format, tuple[str, ...]]] = [
        ("huggingface", ("dataset_dict.json",)),
        ("huggingface", ("state.json", "dataset_info.json")),
        ("scienceqa", ("problems.json", "pid_splits.json")),
        ("coco", ("annotations/captions_*.json",)),
        ("webdataset", ("*.tar",)),
        ("parquet", ("*.parquet",)),
    ]
    for found, names in marks:
        if all(glob.glob(str(Path(glob.escape(str(folder))) / name)) for name in names):
            return found
    return "captions" if is_captions(folder) else None


def _here(path: str) -> Path:
    """A path on this machine.

    Raises:
        RecordError: it is a URL.
    """
    found: Place = place(path)
    if isinstance(found, str):
        raise RecordError(f"{path}: expected a path on this machine; only LLaVA JSON, Parquet and tar are read by URL")
    return found
