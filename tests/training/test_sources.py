"""A run on Parquet, on tar shards and on a mixture of them is the run on LLaVA JSON, bit for bit, stopped or not."""

from __future__ import annotations

import copy
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import yaml
from pyarrow.parquet import write_table
from torch import Tensor

from tests.data.sources.conftest import add
from tests.training.conftest import metrics
from tests.training.test_kills import killed
from vlmzoo.data import order
from vlmzoo.training import run as loop
from vlmzoo.training.run import TrainingResult

Train = Callable[..., tuple[dict[str, Tensor], TrainingResult]]


def parquet(folder: Path, out: Path, name: str) -> str:
    """Row groups of three, with the images' bytes."""
    rows = []
    for value in records(folder, name):
        cells = [{"bytes": (folder / "images" / image).read_bytes()} for image in names(value)]
        rows.append({**value, "image": None, "images": cells or None})
    table = pyarrow.Table.from_pylist(rows).select(["id", "images", "conversations"])
    write_table(table, out / f"{name}.parquet", row_group_size=3)
    return str(out / f"{name}.parquet")


def shards(folder: Path, out: Path, name: str) -> str:
    with tarfile.open(out / f"{name}.tar", "w") as archive:
        for number, value in enumerate(records(folder, name)):
            add(archive, f"{number}.json", json.dumps(value).encode())
            for place, image in enumerate(names(value)):
                add(archive, f"{number}.{place}.png", (folder / "images" / image).read_bytes())
    return str(out / f"{name}.tar")


def mixture(folder: Path, out: Path, name: str) -> str:
    """The first half by JSON, the second one by Parquet."""
    whole = records(folder, name)
    half = len(whole) // 2
    (out / f"{name}-first.json").write_text(json.dumps(whole[:half]))
    (out / f"{name}-second.json").write_text(json.dumps(whole[half:]))
    (out / "images").exists() or (out / "images").symlink_to(folder / "images")
    parquet(out, out, f"{name}-second")
    file = out / f"{name}.yaml"
    entries = [{"path": f"{name}-first.json", "images": str(folder / "images")}, f"{name}-second.parquet"]
    file.write_text(yaml.safe_dump({"sources": entries}))
    return str(file)


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{name}.json").read_text())


def names(value: dict[str, Any]) -> list[str]:
    image = value.get("image", [])
    return [image] if isinstance(image, str) else image


def on(values: dict[str, Any], folder: Path, out: Path, write: Callable[[Path, Path, str], str]) -> dict[str, Any]:
    """The run with its data in another form."""
    values = copy.deepcopy(values)
    out.mkdir(exist_ok=True)
    for data in [stage["data"] for stage in values["stages"].values()]:
        data["path"] = write(folder, out, Path(data["path"]).stem)
    return values


@pytest.mark.parametrize("write", [parquet, shards, mixture])
@pytest.mark.parametrize("cached", [False, True])
def test_it_is_the_run_on_json(
    write: Any, cached: bool, values: dict[str, Any], folder: Path, tmp_path: Path, train_in: Train
) -> None:
    values["stages"]["finetune"]["group_by"] = "modality_length"
    cache = tmp_path / "cache" if cached else None
    expected, _ = train_in(values, tmp_path / "json", cache)
    found, _ = train_in(on(values, folder, tmp_path / "data", write), tmp_path / "other", cache)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert metrics(tmp_path / "other") == metrics(tmp_path / "json")
    if cached:  # equal bytes and texts are stored once, but images of row groups in these groups' order
        features = 2 if write is shards else 4
        assert len(list((tmp_path / "cache" / "features").glob("*/*.safetensors"))) == features
        assert len(list((tmp_path / "cache" / "tokens").rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("number", [2, 6])
def test_stopped_it_ends_the_same(
    number: int,
    values: dict[str, Any],
    folder: Path,
    tmp_path: Path,
    train_in: Train,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the order follows row groups."""
    monkeypatch.setattr(order, "WINDOW", 6)
    values = on(values, folder, tmp_path / "data", mixture)
    expected, _ = train_in(values, tmp_path / "whole")
    take_step, taken = loop.take_step, []

    def step(*arguments: Any) -> dict[str, Any]:
        taken.append(None)
        if len(taken) == number + 1:
            raise RuntimeError("stopped")
        return take_step(*arguments)

    monkeypatch.setattr(loop, "take_step", step)
    with pytest.raises(RuntimeError, match="stopped"):
        train_in(values, tmp_path / "stopped")
    found, _ = train_in(values, tmp_path / "stopped")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


@pytest.mark.scale
def test_killed_it_ends_the_same(values: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    values["checkpoint_every"] = 2
    values["evaluation"]["colors"]["data"] = values["stages"]["finetune"]["data"]
    assert killed(on(values, folder, tmp_path / "data", mixture), tmp_path / "out", 1)
