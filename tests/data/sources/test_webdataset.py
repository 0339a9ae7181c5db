"""Tar shards: records of their members, and damage by the shard's name."""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.data.sources.conftest import add, picture, told, turns, write_shards
from vlmzoo import build
from vlmzoo.config import DataConfig
from vlmzoo.data.images import load_image
from vlmzoo.data.records import RecordError
from vlmzoo.data.sources import webdataset
from vlmzoo.data.sources.tar import Members, OddError, any_members, plain_members
from vlmzoo.data.sources.webdataset import braces


def test_braces_name_shards() -> None:
    assert braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert braces("{0..1}/{1..2}.tar") == ["0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]
    assert braces("a.tar") == ["a.tar"]


def shard(folder: Path, *members: tuple[str, bytes], **options: Any) -> str:
    with tarfile.open(folder / "s.tar", "w", **options) as archive:
        for name, data in members:
            add(archive, name, data)
    return str(folder / "s.tar")


def members(found: Iterable[Members]) -> list[tuple[str, int, int]]:
    return [(name.decode(), int(start), int(size)) for part in found for name, start, size in zip(*part, strict=True)]


def test_captions_and_metadata(tmp_path: Path) -> None:
    """What img2dataset writes: image, caption, and a JSON that is no record."""
    members = [
        ("sub/a.jpg", picture(1)),
        ("sub/a.txt", b"A cube.\n"),
        ("sub/a.json", b'{"url": "x"}'),
        ("sub/a.cls", b"3"),
        ("b.json", json.dumps({"conversations": turns("Hi", "Ho")}).encode()),
    ]
    source = build.source(DataConfig(shard(tmp_path, *members)))
    one, two = source
    assert [turn.text for turn in one.turns] == ["<image>", "A cube."]
    assert (one.id, one.where) == ("sub/a", "s.tar[0] (id 'sub/a')")
    assert load_image(one.images[0]).size == (12, 11)
    assert str(one.images[0]) == f"{tmp_path}/s.tar:sub/a#0@512"
    assert (two.id, two.images) == ("b", ())


def test_faults_name_the_shard_and_the_record(tmp_path: Path) -> None:
    def fault(*members: tuple[str, bytes]) -> str:
        with pytest.raises(RecordError) as caught:
            list(build.source(DataConfig(shard(tmp_path, *members))))
        return str(caught.value)

    good = ("a.txt", b"A."), ("a.jpg", picture(0))
    assert fault(*good, ("b.jpg", picture(1))) == "s.tar[1] (id 'b'): has neither .json nor .txt"
    assert "s.tar[1] (id 'b'): its .json is not valid JSON" in fault(*good, ("b.json", b"{"))
    assert "s.tar[0] (id 'a'): 0 <image> in its human turns for 1 images" in fault(
        ("a.jpg", picture(0)), ("a.json", json.dumps({"conversations": turns("Hi", "Ho")}).encode())
    )
    assert "s.tar[0]: expected an object with `conversations`, got a list" in fault(("a.json", b"[1]"))
    assert "s.tar: holds no record" in fault(("a.cls", b"1"))
    with tarfile.open(tmp_path / "f.tar", "w") as archive:
        (folder := tarfile.TarInfo("sub")).type = tarfile.DIRTYPE
        archive.addfile(folder)
    with pytest.raises(RecordError, match=r"f\.tar: holds no record"):
        build.source(DataConfig(str(tmp_path / "f.tar")))


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("damage", ["cut", "cut between", "header", "no tar"])
def test_a_damaged_shard_is_named(number: int, damage: str, tmp_path: Path, values: list[dict[str, Any]]) -> None:
    path = write_shards(tmp_path, values)
    file = tmp_path / f"{number:03}.tar"
    data = bytearray(file.read_bytes())
    with tarfile.open(file) as archive:
        third = archive.getmembers()[2]
    if damage == "cut":
        data = data[: third.offset_data + 1]
    elif damage == "cut between":
        data = data[: third.offset]
    elif damage == "header":
        data[third.offset + 3] ^= 1
    else:
        data = bytearray(b"nothing" * 300)
    file.write_bytes(data)
    with pytest.raises(RecordError, match=rf"{number:03}\.tar: damaged, or no tar file \(.+\)$") as caught:
        build.source(DataConfig(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(format: int, tmp_path: Path) -> None:
    deep = "a" * 60 + "/" + "b" * 60
    names = ["a.txt", f"{deep}.jpg", "ü.png", *([] if format == tarfile.USTAR_FORMAT else ["c" * 300 + ".txt"])]
    path = shard(tmp_path, *((name, picture(number)) for number, name in enumerate(names)), format=format)
    with tarfile.open(path) as archive:
        expected = [(member.name, member.offset_data, member.size) for member in archive]
    with Path(path).open("rb") as stream:
        assert members(any_members(stream)) == expected
        try:
            assert members(plain_members(stream)) == expected
        except OddError:
            assert format != tarfile.USTAR_FORMAT


@pytest.mark.parametrize("size", [1_500, 60_000])
@pytest.mark.parametrize("time", [None, "1700000000.25"])
def test_many_members_are_those_of_tarfile(size: int, time: str | None, tmp_path: Path) -> None:
    """Over many reads, of small members and of large ones, with folders and headers of times between them."""
    draw = random.Random(0)
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(1200 if size < 10_000 else 60):
            info = tarfile.TarInfo(f"./{number // 100}/{number:05}.txt")
            info.size = draw.choice([0, 1, 511, 512, 513, draw.randrange(2 * size)])
            info.pax_headers = {} if time is None else {"mtime": time}
            if number % 100 == 0:
                folder = tarfile.TarInfo(f"./{number // 100}")
                folder.type = tarfile.DIRTYPE
                archive.addfile(folder)
            archive.addfile(info, io.BytesIO(draw.randbytes(info.size)))
    with tarfile.open(path) as archive:
        expected = [(member.name, member.offset_data, member.size) for member in archive if member.isreg()]
    with path.open("rb") as stream:
        assert members(plain_members(stream)) == expected


@pytest.mark.parametrize(
    "size",
    [
        b"-0000002000\0",
        b"+0000000007\0",
        b"0000_000_07\0",
        b"          7\0",
        b"000000000077",
        b"\x80" + bytes(10) + b"\7",
    ],
)
def test_odd_sizes_are_left_to_tarfile(size: bytes, tmp_path: Path) -> None:
    path = Path(shard(tmp_path, ("a.txt", b"A cube."), ("b.txt", b"A ball."), format=tarfile.USTAR_FORMAT))
    data = bytearray(path.read_bytes())
    data[1024 + 124 : 1024 + 136] = size
    data[1024 + 148 : 1024 + 156] = b" " * 8
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024 : 1024 + 512])
    path.write_bytes(data)
    with path.open("rb") as stream, pytest.raises((OddError, ValueError)):
        members(plain_members(stream))


def test_the_index_of_large_shards_is_kept(
    tmp_path: Path, values: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(webdataset, "LARGE", 1)
    path = write_shards(tmp_path, values)
    whole = told(build.source(DataConfig(path)))
    monkeypatch.setattr(webdataset, "_index", None)
    assert told(build.source(DataConfig(path))) == whole


def test_a_shard_cut_later_is_told_of(tmp_path: Path, values: list[dict[str, Any]]) -> None:
    source = build.source(DataConfig(write_shards(tmp_path, values)))
    file = tmp_path / "000.tar"
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(RecordError, match=re.escape("000.tar[3] (id 'r3'): cannot be read (") + ".* ends before byte"):
        source[3]
