"""Recipes say where published sets come from; fetching goes on where it stopped, and verifying finds what is wrong."""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
import pytest
import yaml
from huggingface_hub import file_download
from PIL import Image

from tests.test_cli import fails
from vlmzoo import build
from vlmzoo.cli import main
from vlmzoo.data.published import recipes
from vlmzoo.data.published.fetch import fetch, verify
from vlmzoo.data.published.recipes import recipe
from vlmzoo.files import locked

RECORDS = [
    {
        "id": str(n),
        "image": f"{n}.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}],
    }
    for n in range(3)
]
PARTS = {"a/0.parquet": b"a0", "a/1.parquet": b"a1", "b/0.parquet": b"b0"}


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="PNG")
    return buffer.getvalue()


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return buffer.getvalue()


class Hub:
    """A hub and a web server with a few files, which count what is asked of them and may break off."""

    def __init__(self) -> None:
        train = json.dumps(RECORDS).encode()
        self.files = {"tiny/tiny": {"train.json": train, **PARTS}}
        self.web = {"https://example.org/images.zip": archive({f"images/{n}.png": picture() for n in range(3)})}
        self.asked: list[str] = []
        self.break_off_at: int | None = None

    def snapshot_download(self, repo: str, *, repo_type: str, allow_patterns: list[str], local_dir: Path) -> str:
        assert repo_type == "dataset"
        self.asked.append(f"{repo}: {allow_patterns[0]}")
        if repo not in self.files:
            raise OSError("no network\nand a second line")
        for name, content in self.files[repo].items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                (local_dir / name).write_bytes(content)
        return str(local_dir)

    def http_get(self, url: str, temp_file: BinaryIO, *, resume_size: int = 0) -> None:
        self.asked.append(f"{url} from {resume_size}")
        content = self.web[url]
        temp_file.write(content[resume_size : self.break_off_at])
        if self.break_off_at is not None:
            raise OSError("connection lost")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    monkeypatch.setattr(file_download, "http_get", found.http_get)
    return found


TINY: dict[str, Any] = {
    "summary": "three records",
    "paper": "nobody (2024)",
    "page": "https://example.org",
    "licence": "CC0",
    "records": 3,
    "files": [
        {
            "path": "train.json",
            "repo": "tiny/tiny",
            "records": 3,
            "sha256": hashlib.sha256(json.dumps(RECORDS).encode()).hexdigest(),
        },
        {"path": "images.zip", "url": "https://example.org/images.zip", "unpack": "."},
    ],
    "images": {"images": 3},
    "data": {"train": {"path": "train.json", "images": "images", "template": "plain"}},
}
PARTED: dict[str, Any] = {
    **{key: TINY[key] for key in ("summary", "paper", "page", "licence")},
    "files": [{"path": "{part}/*.parquet", "repo": "tiny/tiny"}],
    "data": {"{part}": {"path": "{part}/*.parquet"}},
    "parts": ["a", "b"],
}


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes recipes known, which stand alone then."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.setattr(recipes, "RECIPES", folder)

    def add_recipe(name: str, values: dict[str, Any], **changes: Any) -> None:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**values, **changes}))

    add_recipe("tiny", TINY)
    add_recipe("parted", PARTED)
    return add_recipe


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_reads_and_says_what_a_run_needs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = recipe(name).of_parts([])
    for file in found.files:
        assert (file.repo is None) != (file.url is None)
        assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256)
        assert not Path(file.path).is_absolute()
        assert ".." not in file.path
    assert main(["data", "show", name]) == 0
    shown = capsys.readouterr().out
    given = [yaml.safe_load(line.split("data: ", 1)[1]) for line in shown.splitlines() if line.startswith("  data: ")]
    assert [Path(values["path"]).parts[:2] for values in given if ":" not in values["path"]] == [
        ("data", name) for values in given if ":" not in values["path"]
    ]
    assert len(given) == len(recipe(name).data)


def test_the_recipes_of_the_issue_are_there() -> None:
    expected = {"cauldron", "llava-instruct", "llava-mix665k", "llava-pretrain", "scienceqa", "sharegpt4v"}
    assert set(recipes.names()) == expected
    assert len(recipe("cauldron").parts) == 50
    counts = {name: recipe(name).records for name in ("llava-pretrain", "llava-mix665k", "scienceqa")}
    assert counts == {"llava-pretrain": 558_128, "llava-mix665k": 665_298, "scienceqa": 21_208}


def test_list_names_them_with_their_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "datasets"]) == 0
    listed = capsys.readouterr().out
    assert "llava-mix665k\n    665,298 records" in listed
    assert "world:captions\n    12,000 records" in listed


def test_a_fetched_set_is_verified_and_read(
    add: object, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    assert main(["data", "fetch", "tiny", "--out", str(folder)]) == 0
    assert "train.json: 3 records" in capsys.readouterr().out
    assert (
        len(build.source(recipe("tiny").data["train"].__class__(str(folder / "train.json"), str(folder / "images"))))
        == 3
    )
    asked = list(hub.asked)
    (folder / "images.zip").unlink()  # it is unpacked: its space may be had back
    assert main(["data", "fetch", "tiny", "--out", str(folder)]) == 0
    assert hub.asked == asked, "what is there was fetched again"
    assert main(["data", "verify", "tiny", str(folder)]) == 0


def test_a_download_goes_on_where_it_broke_off(add: object, hub: Hub, tmp_path: Path) -> None:
    hub.break_off_at = 100
    with pytest.raises(
        ValueError, match=r"^images\.zip: https://example\.org/images\.zip gave nothing \(connection lost\)$"
    ):
        fetch(recipe("tiny"), tmp_path / "tiny")
    assert not (tmp_path / "tiny" / "images.zip").exists()
    hub.break_off_at = None
    fetch(recipe("tiny"), tmp_path / "tiny")
    assert hub.asked[-1] == "https://example.org/images.zip from 100"
    assert all(found.fault is None for found in verify(recipe("tiny"), tmp_path / "tiny"))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file lacks": (lambda folder: (folder / "train.json").unlink(), "train.json  no such file"),
    "another content": (lambda folder: (folder / "train.json").write_text("[1, 2, 3]"), "train.json: hash  SHA-256"),
    "a record lacks": (
        lambda folder: (folder / "train.json").write_text("[1, 2]"),
        "train.json: records  2, expected 3",
    ),
    "no JSON": (lambda folder: (folder / "train.json").write_text("[1, "), "train.json: records  cannot be read"),
    "an image lacks": (lambda folder: (folder / "images" / "0.png").unlink(), "images: images  2 images, expected 3"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_lacks_or_differs_is_said(
    name: str, add: object, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    fetch(recipe("tiny"), folder)
    spoil, expected = SPOILT[name]
    spoil(folder)
    assert main(["data", "verify", "tiny", str(folder)]) == 1
    assert f"WRONG   {expected}" in capsys.readouterr().out


def test_parts_are_had_one_by_one(add: object, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "parted"
    assert "name the parts to fetch" in fails(capsys, "data", "fetch", "parted", "--out", str(folder))
    assert "unknown part 'c'" in fails(capsys, "data", "fetch", "parted", "c", "--out", str(folder))
    assert main(["data", "fetch", "parted", "a", "--out", str(folder)]) == 0
    assert sorted(file.name for file in folder.rglob("*.parquet")) == ["0.parquet", "1.parquet"]
    assert main(["data", "verify", "parted", str(folder), "a"]) == 0
    assert main(["data", "verify", "parted", str(folder)]) == 1
    fetch(recipe("parted").of_parts(["a"]), folder)
    assert hub.asked == ["tiny/tiny: a/*.parquet"] * 2, "of several files only the hub knows what lacks"


def test_two_at_once_do_not_write_one_file(add: object, hub: Hub, tmp_path: Path) -> None:
    with locked(tmp_path / "set"), pytest.raises(ValueError, match="another process is working here"):
        fetch(recipe("tiny"), tmp_path / "set")
    assert hub.asked == []


def test_without_a_network_one_line_says_so(
    add: Callable[..., None], hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files.clear()
    error = fails(capsys, "data", "fetch", "tiny", "--out", str(tmp_path / "tiny"))
    assert error == "vlmzoo: error: train.json: tiny/tiny gave nothing (no network)\n"


def test_an_archive_cannot_write_outside_its_folder(add: object, hub: Hub, tmp_path: Path) -> None:
    hub.web["https://example.org/images.zip"] = archive({"../../outside.png": b"x"})
    with pytest.raises(ValueError, match="outside the folder"):
        fetch(recipe("tiny"), tmp_path / "tiny")
    assert not list(tmp_path.rglob("outside.png"))
    hub.web["https://example.org/images.zip"] = b"no archive"
    with pytest.raises(ValueError, match=r"cannot be unpacked .*; delete it"):
        fetch(recipe("tiny"), tmp_path / "other")


def test_unknown_names_and_missing_folders(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'llava-pretrain'?" in fails(capsys, "data", "show", "llava-pretrian")
    assert "expected its folder too" in fails(capsys, "data", "verify", "scienceqa")
