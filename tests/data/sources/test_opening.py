"""Every source reads the same records; which one a path names; faults by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.data.sources.conftest import COUNT, WRITERS, content, names, told, write_json
from vlmzoo import build
from vlmzoo.config import DataConfig, parse
from vlmzoo.data.images import ImageError, image_size, load_image
from vlmzoo.data.order import batches
from vlmzoo.data.records import RecordError
from vlmzoo.data.sources.opening import kind, split_of
from vlmzoo.files import StoredBytes, content_hashes

Values = list[dict[str, Any]]


@pytest.fixture(params=WRITERS)
def path(request: pytest.FixtureRequest, tmp_path: Path, values: Values) -> str:
    return WRITERS[request.param](tmp_path / "set", values)


def test_all_read_the_same(path: str, values: Values) -> None:
    source = build.source(DataConfig(path))
    found = told(source)
    assert len(source) == len(found) == COUNT
    for (identity, turns, images), value in zip(found, values, strict=True):
        assert identity == value["id"]
        assert [(turn.role, turn.text) for turn in turns] == [
            (turn["from"], turn["value"]) for turn in value["conversations"]
        ]
        assert len(images) == len(names(value))
    record = source[6]
    assert [image_size(image) for image in record.images] == [image_size_of(name) for name in names(values[6])]
    assert told(build.source(DataConfig(path, limit=9))) == found[:9]
    with pytest.raises(IndexError, match=f"record {COUNT} of {COUNT}"):
        source[COUNT]


def image_size_of(name: str) -> tuple[int, int]:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(content(name))) as image:
        return image.height, image.width


def test_pixels_are_those_of_the_files(path: str, tmp_path: Path, values: Values) -> None:
    plain = build.source(DataConfig(write_json(tmp_path / "plain", values)))
    assert told(build.source(DataConfig(path))) == told(plain)


@pytest.mark.parametrize("start", [0, 1, 5, 8])
def test_the_order_continues_from_any_step(path: str, start: int) -> None:
    """It is a function of the seed and the step, and so the same for every rank, which takes its part of each batch."""
    source = build.source(DataConfig(path))
    whole = list(islice(batches(len(source), 6, 3, blocks=source.blocks), 12))
    again = build.source(DataConfig(path))
    assert list(islice(batches(len(again), 6, 3, start, blocks=again.blocks), 12 - start)) == whole[start:]
    stream = [index for batch in whole for index in batch]
    for epoch in range(3):
        assert sorted(stream[epoch * COUNT : (epoch + 1) * COUNT]) == list(range(COUNT))


def test_images_have_names_that_tell_them_apart(path: str, tmp_path: Path) -> None:
    source = build.source(DataConfig(path))
    images = [image for record in source for image in record.images]
    again = [image for record in build.source(DataConfig(path)) for image in record.images]
    assert images == again
    assert len(set(images)) == len({str(image) for image in images}) == len(images)
    hashes = content_hashes(images, tmp_path / "hashes")
    assert len(set(hashes.values())) == len(images)
    for image in images:
        if isinstance(image, StoredBytes):
            assert image.file is not None
            assert image.file.is_file()


def test_fingerprints_tell_data_apart(tmp_path: Path, values: Values) -> None:
    for number, write in enumerate(WRITERS.values()):
        one = build.source(DataConfig(write(tmp_path / f"{number}a", values))).fingerprint()
        same = build.source(DataConfig(write(tmp_path / f"{number}b", values))).fingerprint()
        other = build.source(DataConfig(write(tmp_path / f"{number}c", [*values[:-1], values[0]]))).fingerprint()
        told = [{key: value for key, value in found.items() if key != "file"} for found in (one, same, other)]
        json.dumps(told)
        assert told[0] != told[2]
        if write is not WRITERS["saved to disk"]:  # its own differs with the folder
            assert told[0] == told[1]


def test_the_kind_is_told_from_the_path(tmp_path: Path) -> None:
    for name, expected in {
        "a.json": "llava",
        "a.jsonl": "llava",
        "b/*.parquet": "parquet",
        "{0..9}.tar": "webdataset",
        "hf:owner/name": "huggingface",
        "x.yml": "mixture",
        "s3://bucket/x.tar": "webdataset",
    }.items():
        assert kind(name) == expected
    for file, expected in {
        "disk/dataset_dict.json": "huggingface",
        "sqa/problems.json": None,
        "sqa/pid_splits.json": "scienceqa",
        "coco/annotations/captions_val2017.json": "coco",
        "shards/1.tar": "webdataset",
        "tables/1.parquet": "parquet",
        "pairs/sub/a.jpg": "captions",
        "table/metadata.csv": "captions",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
        if expected is not None:
            assert kind(str(tmp_path / file.split("/")[0])) == expected
    assert split_of(f"{tmp_path}/coco:val2017") == (f"{tmp_path}/coco", "val2017")
    assert split_of("hf:owner/name/config:test") == ("hf:owner/name/config", "test")
    assert split_of("s3://bucket/x.tar") == ("s3://bucket/x.tar", None)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "nowhere: no such file or folder; expected x.json or x.jsonl"),
        (".", "of no kind that is known; expected x.json"),
        ("absent.json", "absent.json: no such file; expected LLaVA JSON"),
        ("absent/*.parquet", "absent/*.parquet: no such file; expected *.parquet"),
        ("absent-{0..3}.tar", "absent-0.tar: no such file; expected *.tar"),
        ("a-{9..3}.tar", "{9..3} counts down"),
        ("absent.yaml", "absent.yaml: cannot be read"),
        ("nothing://x/a.parquet", "nothing://x/a.parquet: cannot be read (Protocol not known: nothing)"),
        ("hf:name", "hf:name: expected hf:OWNER/NAME"),
    ],
)
def test_what_cannot_be_opened(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecordError, match=re.escape(message)) as caught:
        build.source(DataConfig(path))
    assert "\n" not in str(caught.value)


def test_a_format_may_be_named(tmp_path: Path, values: Values) -> None:
    file = Path(write_json(tmp_path, values))
    file.rename(tmp_path / "data.txt")
    with pytest.raises(RecordError, match="of no kind that is known"):
        build.source(DataConfig(str(tmp_path / "data.txt")))
    assert len(build.source(DataConfig(str(tmp_path / "data.txt"), format="llava"))) == COUNT
    with pytest.raises(RecordError, match="llava has no splits, got 'train'"):
        build.source(DataConfig(f"{tmp_path}:train", format="llava"))
    with pytest.raises(ValueError, match="unknown value of format: 'lava'; did you mean 'llava'"):
        parse(DataConfig, {"path": "a.json", "format": "lava"})


@pytest.mark.parametrize(("module", "writer"), [("pyarrow", "parquet"), ("datasets", "saved to disk")])
def test_absent_packages_are_named(
    module: str, writer: str, tmp_path: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = WRITERS[writer](tmp_path, values)
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(module), *sys.meta_path])
    with pytest.raises(RecordError, match=rf"needs {module}, got none; pip install 'vlmzoo\[data\]'"):
        build.source(DataConfig(path))


class Absent:
    """Finds that a package is not there."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == self.module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.module)


@pytest.fixture
def memory(values: Values) -> Callable[[str], str]:
    """Copies a local file to fsspec's memory."""
    import fsspec

    def copy(file: str) -> str:
        url = f"memory://bucket/{Path(file).name}"
        with fsspec.open(url, "wb") as stream:
            stream.write(Path(file).read_bytes())  # pyright: ignore
        return url

    return copy


def test_files_behind_urls(tmp_path: Path, values: Values, memory: Callable[[str], str]) -> None:
    plain = told(build.source(DataConfig(write_json(tmp_path, values))))
    for value in values:
        for name in names(value):
            memory(str(tmp_path / "images" / name))
    url, jsonl = memory(str(tmp_path / "data.json")), memory(WRITERS["jsonl"](tmp_path, values))
    flat = [{**value, **({"image": names(value)[0]} if "image" in value else {})} for value in values]
    assert told(build.source(DataConfig(url, images=str(tmp_path / "images")))) == plain
    assert told(build.source(DataConfig(jsonl, images=f"file://{tmp_path}/images"))) == plain
    (tmp_path / "data.json").write_text(json.dumps([flat[0], flat[1]]))
    found = build.source(DataConfig(str(tmp_path / "data.json"), images="memory://bucket/"))
    assert told(found) == plain[:2]
    assert str(found[0].images[0]) == "memory://bucket/0.png"
    WRITERS["parquet"](tmp_path / "tables", values)
    for number in range(2):
        memory(str(tmp_path / "tables" / f"{number}.parquet"))
    assert told(build.source(DataConfig("memory://bucket/*.parquet"))) == plain
    WRITERS["webdataset"](tmp_path / "shards", values)
    for number in range(3):
        memory(str(tmp_path / "shards" / f"{number:03}.tar"))
    remote = build.source(DataConfig("memory://bucket/{000..002}.tar"))
    assert told(remote) == plain
    assert content_hashes(remote[0].images, tmp_path / "hashes")
    assert remote.fingerprint()["files"] == 3


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "memory://other/a.png", ".."])
def test_urls_stay_below_their_prefix(name: str, tmp_path: Path) -> None:
    value = {"id": "abc", "image": name, "conversations": [{"from": "human", "value": "<image>"}]}
    value["conversations"].append({"from": "gpt", "value": "A."})  # pyright: ignore
    (tmp_path / "data.json").write_text(json.dumps([value]))
    source = build.source(DataConfig(str(tmp_path / "data.json"), images="memory://bucket/images"))
    with pytest.raises(ImageError, match=r"data\.json\[0\] \(id 'abc'\): image '.*' lies outside the image folder"):
        source[0]


def test_what_is_not_behind_a_url(tmp_path: Path, values: Values) -> None:
    (tmp_path / "data.json").write_text(json.dumps(values[:1]))
    record = build.source(DataConfig(str(tmp_path / "data.json"), images="memory://empty"))[0]
    with pytest.raises(ImageError, match=r"data\.json\[0\] \(id 'r0'\): image memory://empty/0\.png does not exist"):
        load_image(record.images[0], where=record.where)
