"""Columns of the hub's data sets, Parquet and `datasets`: what they become, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow.parquet import write_table

from tests import tiny
from tests.data.sources.conftest import picture, rows, turns, write_images
from vlmzoo import build
from vlmzoo.config import DataConfig
from vlmzoo.data import order
from vlmzoo.data.images import ImageError, load_image
from vlmzoo.data.records import Record, RecordError
from vlmzoo.data.sources.parquet import Latest, ParquetFiles
from vlmzoo.vision.cache import FeatureCache

PNG = picture(0)
CELL = {"bytes": PNG, "path": None}


def record(tmp_path: Path, row: dict[str, Any]) -> Record:
    write_table(pyarrow.Table.from_pylist([row]), tmp_path / "t.parquet")
    return build.source(DataConfig(str(tmp_path / "t.parquet")))[0]


def texts(found: Record) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in found.turns]


def test_the_cauldron(tmp_path: Path) -> None:
    talk = [{"user": "Which?", "assistant": "A.", "source": "x"}, {"user": "Why?", "assistant": "So.", "source": "x"}]
    found = record(tmp_path, {"images": [CELL, CELL], "texts": talk})
    assert texts(found)[:2] == [("human", "<image>\n<image>\nWhich?"), ("gpt", "A.")]
    assert len(found.turns) == 4
    assert len(found.images) == 2
    assert found.where == "t.parquet[0] (id '0')"


@pytest.mark.parametrize("cell", [PNG, CELL, {"path": "a.png"}, {"bytes": None, "path": "a.png"}, "a.png", [PNG]])
def test_images_in_cells(cell: Any, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(PNG)
    found = record(tmp_path, {"image": cell, "conversations": turns("<image>", "A."), "id": 7})
    assert found.id == "7"
    assert load_image(found.images[0]).size == (12, 10)


def test_chat_messages(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}]
    assert texts(record(tmp_path, {"image": CELL, "messages": talk}))[0] == ("human", "<image>\nWhat?")
    parts = [{"type": "text", "text": "See "}, {"type": "image", "text": None}, {"type": "text", "text": "here."}]
    talk = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
    ]
    assert texts(record(tmp_path, {"image": CELL, "messages": talk})) == [
        ("human", "See <image>\nhere."),
        ("gpt", "A."),
    ]
    with pytest.raises(RecordError, match=r"t\.parquet\[0\] \(id '0'\): turn 0 is from 'system', expected 'human'"):
        record(tmp_path, {"messages": [{"role": "system", "content": "Be."}]})


FAULTS: dict[str, tuple[dict[str, Any], type[ValueError], str]] = {
    "columns": (
        {"picture": PNG, "label": 3},
        RecordError,
        "t.parquet: has columns picture, label; expected conversations in `conversations`, `texts` or `messages`, "
        "and images, where there are any, in `image` or `images`",
    ),
    "too few tokens": (
        {"images": [CELL, CELL], "conversations": turns("<image>", "A.")},
        RecordError,
        "t.parquet[0] (id '0'): 1 <image> in its human turns for 2 images",
    ),
    "nothing in a cell": (
        {"images": [{"bytes": None, "path": None}], "conversations": turns("<image>", "A.")},
        ImageError,
        "t.parquet[0]: an image's cell",
    ),
    "a path that leads out": (
        {"image": "../../etc/passwd", "conversations": turns("<image>", "A.")},
        ImageError,
        "t.parquet[0] (id '0'): image '../../etc/passwd' lies outside the image folder",
    ),
    "a number as the answer": (
        {"texts": [{"user": "a", "assistant": 3}]},
        RecordError,
        "t.parquet[0] (id '0'): turn 1: expected an object with texts",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, tmp_path: Path) -> None:
    row, kind, message = FAULTS[fault]
    (tmp_path / "images").mkdir()
    with pytest.raises(kind, match=re.escape(message)) as caught:
        record(tmp_path, row)
    assert "\n" not in str(caught.value)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    found = record(tmp_path, {"image": PNG[:60], "conversations": turns("<image>", "A.")})
    with pytest.raises(ImageError, match=r"t\.parquet\[0\] \(id '0'\): image .*t\.parquet\[0\]\.images\[0\] cannot be"):
        load_image(found.images[0], where=found.where)


def test_damaged_and_unlike_files(tmp_path: Path, values: list[dict[str, Any]]) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(RecordError, match=r"a\.parquet: cannot be read"):
        build.source(DataConfig(str(tmp_path / "a.parquet")))
    write_table(pyarrow.Table.from_pylist(rows(values)), tmp_path / "a.parquet")
    write_table(pyarrow.Table.from_pylist([{"texts": [{"user": "a", "assistant": "b"}]}]), tmp_path / "b.parquet")
    with pytest.raises(RecordError, match=r"b\.parquet: lacks the column 'conversations', which .*a\.parquet has"):
        build.source(DataConfig(str(tmp_path)))


def test_row_groups_are_read_once_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What streams: an epoch in its order reads each row group once, though its records are shuffled."""
    monkeypatch.setattr(order, "WINDOW", 40)
    monkeypatch.setattr("vlmzoo.data.sources.parquet.WINDOW", 40)
    table = pyarrow.Table.from_pylist([{"conversations": turns("Hi", str(number))} for number in range(1000)])
    write_table(table, tmp_path / "t.parquet", row_group_size=10)
    source = build.source(DataConfig(str(tmp_path / "t.parquet")))
    assert isinstance(source, ParquetFiles)
    loads: list[int] = []
    load = source._held._load
    source._held._load = lambda number: loads.append(number) or load(number)
    whole = order.epoch_order(1000, 0, 0, blocks=source.blocks)
    assert sorted(whole) == list(range(1000))
    assert [source[index].turns[1].text for index in whole] == list(map(str, whole))
    assert sorted(loads) == list(range(100))
    window = {index // 10 for index in whole[:40]}
    assert len(window) == 4
    assert whole[:40] != sorted(whole[:40])
    assert whole != order.epoch_order(1000, 0, 1, blocks=source.blocks)


def test_modalities_are_grouped_within_blocks() -> None:
    blocks = np.arange(100, 20_001, 100)
    text_only = np.arange(20_000) % 3 == 0
    found = list(islice(order.batches(20_000, 8, 0, 0, text_only, blocks), 2500))
    assert sorted(index for batch in found for index in batch) == list(range(20_000))
    assert sum(len({bool(text_only[index]) for index in batch}) == 1 for batch in found) > 2490
    assert len({index // 100 for batch in found[:250] for index in batch}) < 60  # of 200 blocks
    assert list(islice(order.batches(20_000, 8, 0, 7, text_only, blocks), 9)) == found[7:16]


def test_what_several_threads_ask_for_is_loaded_once() -> None:
    loads: list[int] = []
    held = Latest(lambda number: loads.append(number) or number * 2, 4)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(held.__getitem__, [1, 2, 3] * 50)) == [2, 4, 6] * 50
    assert sorted(loads) == [1, 2, 3]
    broken = Latest(lambda number: 1 // number, 1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            broken[0]
    assert broken[1] == 1


def test_the_hub_by_name(tmp_path: Path, values: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []
    found = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows(values)), "test": datasets.Dataset.from_list(rows(values[:3]))}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: asked.append((given, more)) or found)
    assert len(build.source(DataConfig("hf:owner/name/config:test"))) == 3
    assert asked == [(("owner/name", "config"), {})]
    assert len(build.source(DataConfig("hf:owner/name:train"))) == len(values)
    with pytest.raises(RecordError, match="hf:owner/name: has splits train, test; name one, as hf:owner/name:train"):
        build.source(DataConfig("hf:owner/name"))
    with pytest.raises(RecordError, match="unknown split 'tset'; did you mean 'test'"):
        build.source(DataConfig("hf:owner/name:tset"))
    found.save_to_disk(str(tmp_path / "saved"))
    assert len(build.source(DataConfig(f"{tmp_path}/saved:test"))) == 3

    def fail(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("Couldn't find owner/name\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(RecordError, match=r"hf:owner/name: cannot be read \(Couldn't find owner/name\)$"):
        build.source(DataConfig("hf:owner/name"))


def test_images_beside_a_table(tmp_path: Path, values: list[dict[str, Any]]) -> None:
    write_images(tmp_path / "elsewhere", values)
    names = {"image": "0.png", "conversations": turns("<image>", "A.")}
    write_table(pyarrow.Table.from_pylist([names]), tmp_path / "t.parquet")
    found = build.source(DataConfig(str(tmp_path / "t.parquet"), images=str(tmp_path / "elsewhere")))[0]
    assert found.images == ((tmp_path / "elsewhere" / "0.png").resolve(),)
    with pytest.raises(RecordError, match=r"t\.parquet: its records have images, but there is no image folder"):
        build.source(DataConfig(str(tmp_path / "t.parquet")))[0]


def test_features_are_computed_in_the_order_of_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row group is read twice: once for the images' hashes, once for their pixels."""
    monkeypatch.setattr("vlmzoo.data.sources.parquet.WINDOW", 1)
    table = pyarrow.Table.from_pylist(
        [{"image": picture(number), "conversations": turns("<image>", "A.")} for number in range(40)]
    )
    write_table(table, tmp_path / "t.parquet", row_group_size=4)
    source = build.source(DataConfig(str(tmp_path / "t.parquet")))
    assert isinstance(source, ParquetFiles)
    images = [image for record in source for image in record.images]
    loads: list[int] = []
    load = source._held._load
    source._held._load = lambda number: loads.append(number) or load(number)
    model = tiny.model("linear")

    def to_pixels(groups: Any) -> Iterator[torch.Tensor]:
        for group in groups:
            yield torch.cat([tiny.pixels(1) for image in group if load_image(image)])

    FeatureCache(model.vision, images, to_pixels, {}, model.connector.requires, tmp_path / "features")
    pixels = loads[-10:]
    assert pixels == list(range(10))
    assert len(loads) < 30
