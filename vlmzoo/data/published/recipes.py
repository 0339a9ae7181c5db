"""Published data sets: where they come from, how they are laid out, and what tells that all of it is there."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vlmzoo.config import DataConfig, parse, to_dict
from vlmzoo.registry import unknown

RECIPES = Path(str(resources.files("vlmzoo.data.published")))


@dataclass
class RemoteFile:
    """A file of a set. `null` is what nobody published: it is not checked."""

    path: str  # below the set's folder; in a repository of the hub it has the same
    repo: str | None = None  # a data set of the Hugging Face hub
    url: str | None = None  # or an address
    unpack: str | None = None  # the folder, below the set's, that an archive is unpacked into
    sha256: str | None = None
    records: int | None = None  # of a JSON file: the list's values, the object's keys


@dataclass
class Recipe:
    """A published set. Paths are below the folder that it is fetched into; `{part}` in them stands for each part."""

    summary: str
    paper: str
    page: str
    licence: str
    files: list[RemoteFile]
    data: dict[str, DataConfig]  # what reads it, by name
    records: int | None = None  # of the whole set
    images: dict[str, int | None] = field(default_factory=dict)  # folder: how many images it holds
    parts: list[str] = field(default_factory=list)  # that can be had one by one
    notes: list[str] = field(default_factory=list)

    def of_parts(self, chosen: list[str]) -> Recipe:
        """The recipe with its paths written out for these parts, or for all of them."""
        names = chosen or self.parts
        for name in names:
            if name not in self.parts:
                raise unknown("part", name, self.parts)
        if not self.parts:
            return self
        values = to_dict(self)
        return parse(
            Recipe,
            values
            | {
                "files": [written for value in values["files"] for written in _written(value, names)],
                "data": {name: config for name in names for config in _written(values["data"]["{part}"], [name])},
            },
        )


def names() -> list[str]:
    """The names of all recipes."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in names():
        raise unknown("published set", name, names())
    return parse(Recipe, yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8")))


def describe(name: str, found: Recipe, folder: Path) -> str:
    """What to fetch, into which layout, and what reads it then, as text."""
    count = f"{found.records:,} records" if found.records is not None else "number of records not published"
    lines = [
        f"{name}: {found.summary}",
        f"  {count}; {found.licence}",
        f"  {found.paper}",
        f"  {found.page}",
        "",
        "files:",
    ]
    for file in found.files:
        known = [f"{file.records:,} records" if file.records else "", f"sha256 {file.sha256}" if file.sha256 else ""]
        lines.append(f"  {folder / file.path}" + "".join(f"  ({item})" for item in known if item))
        lines.append(f"      {file.url or f'https://huggingface.co/datasets/{file.repo}'}")
        if file.unpack is not None:
            lines.append(f"      unpacked into {folder / file.unpack}")
    for images, number in found.images.items():
        lines.append(f"  {folder / images}/  ({f'{number:,} images' if number else 'images'})")
    if found.parts:
        lines.append(f"parts: {', '.join(found.parts)}")
    lines += [f"note: {note}" for note in found.notes]
    lines += ["", "in a run's YAML:"]
    for config in found.data.values():
        lines.append(f"  data: {_flow(config, folder)}")
    return "\n".join(lines)


def _flow(config: DataConfig, folder: Path) -> str:
    """What of a data configuration is not the default, on one line of YAML."""
    values: dict[str, Any] = {"path": _below(config.path, folder)}
    if config.images is not None:
        values["images"] = _below(config.images, folder)
    values |= {"template": config.template.value, "image_mode": config.image_mode}
    return yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=1000).strip()


def _below(path: str, folder: Path) -> str:
    """A path of the recipe in its place; `.:train` is a split of the folder itself."""
    return f"{folder}{path[1:]}" if path.startswith(".:") else str(folder / path)


def _written(value: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    return [
        {key: item.replace("{part}", name) if isinstance(item, str) else item for key, item in value.items()}
        for name in names
    ]
