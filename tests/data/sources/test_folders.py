"""Folders of captions, COCO's and ScienceQA's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.data.sources.conftest import picture
from vlmzoo import build
from vlmzoo.config import DataConfig
from vlmzoo.data.images import ImageError, load_image
from vlmzoo.data.records import Record, RecordError


def write(folder: Path, files: dict[str, str | None]) -> str:
    """Texts, and a picture for each that is none."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            (folder / name).write_bytes(picture(0))
        else:
            (folder / name).write_text(text)
    return str(folder)


def told(found: Record) -> tuple[str, list[str], list[str]]:
    return found.id, [turn.text for turn in found.turns], [image.name for image in found.images]  # pyright: ignore


def test_pairs(tmp_path: Path) -> None:
    files = {"b.jpg": None, "b.txt": " A dog.\n", "sub/a.PNG": None, "sub/a.caption": "A cat.", "notes.md": "x"}
    source = build.source(DataConfig(write(tmp_path / "set", files)))
    assert [told(found) for found in source] == [
        ("b.jpg", ["<image>", "A dog."], ["b.jpg"]),
        ("sub/a.PNG", ["<image>", "A cat."], ["a.PNG"]),
    ]
    assert source[1].where == "set[1] (id 'sub/a.PNG')"
    assert load_image(source[1].images[0]).size == (12, 10)


PAIRS: dict[str, tuple[dict[str, str | None], str]] = {
    "no caption": ({"a.jpg": None}, "an image a has no caption; expected a.txt or .caption beside it"),
    "no image": ({"s/a.jpg": None, "s/a.txt": "A", "s/b.txt": "B"}, "caption s/b has no image beside it"),
    "two captions": ({"a.jpg": None, "a.txt": "A", "a.caption": "B"}, "a has two images or captions"),
    "two images": ({"a.jpg": None, "a.png": None, "a.txt": "A"}, "a has two images or captions"),
    "empty caption": ({"a.jpg": None, "a.txt": "\n"}, "set[0] (id 'a.jpg'): turn 1: the answer is empty"),
    "columns": (
        {"metadata.csv": "name,text\na.jpg,A\n"},
        "metadata.csv[0]: has columns name, text; expected",
    ),
    "no file": ({"metadata.csv": "file_name,text\na.jpg,A\n"}, "metadata.csv[0] (id 'a.jpg'): image 'a.jpg' is not in"),
    "no JSON": ({"metadata.jsonl": '{"file_name": 3}\n{'}, "metadata.jsonl[0]: has columns file_name; expected"),
    "half a line": ({"a.jpg": None, "metadata.jsonl": '{"file_name": "a.jpg", "text": "A"}\n{'}, "JSON at line 2"),
    "outside": ({"metadata.jsonl": '{"file_name": "../a.jpg", "text": "A"}'}, "'../a.jpg' lies outside"),
}


@pytest.mark.parametrize("fault", PAIRS)
def test_faulty_pairs_are_named(fault: str, tmp_path: Path) -> None:
    files, message = PAIRS[fault]
    with pytest.raises((RecordError, ImageError), match=re.escape(message)) as caught:
        list(build.source(DataConfig(write(tmp_path / "set", files), format="captions")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "table",
    [
        {"metadata.csv": 'file_name,caption,n\nb.jpg,"A, dog.",1\na.jpg,A cat.,2\n'},
        {"metadata.jsonl": '{"file_name": "b.jpg", "text": "A, dog."}\n\n{"file_name": "a.jpg", "text": "A cat."}'},
    ],
)
def test_a_table_of_captions(table: dict[str, str | None], tmp_path: Path) -> None:
    source = build.source(DataConfig(write(tmp_path, {"a.jpg": None, "b.jpg": None, **table})))
    assert [told(found)[1:] for found in source] == [
        (["<image>", "A, dog."], ["b.jpg"]),
        (["<image>", "A cat."], ["a.jpg"]),
    ]


def coco(folder: Path, *splits: str, **changed: Any) -> str:
    document = {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 9, "file_name": "9.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 9, "caption": "A dog. "},
            {"id": 2, "image_id": 7, "caption": "A cat."},
            {"id": 3, "image_id": 9, "caption": "Again."},
        ],
    } | changed
    for split in splits:
        write(folder, {f"annotations/captions_{split}.json": json.dumps(document), f"{split}/7.jpg": None})
        write(folder, {f"{split}/9.jpg": None})
    return str(folder)


def test_coco_has_a_record_an_annotation(tmp_path: Path) -> None:
    path = coco(tmp_path / "coco", "train2017", "val2017")
    source = build.source(DataConfig(f"{path}:val2017"))
    assert [told(found) for found in source] == [
        ("1", ["<image>", "A dog."], ["9.jpg"]),
        ("2", ["<image>", "A cat."], ["7.jpg"]),
        ("3", ["<image>", "Again."], ["9.jpg"]),
    ]
    assert source[0].where == "captions_val2017.json[0] (id '1')"
    with pytest.raises(RecordError, match=r"coco: has splits train2017, val2017; name one, as .*coco:train2017"):
        build.source(DataConfig(path))
    with pytest.raises(RecordError, match=r"unknown split 'val2014'; did you mean 'val2017'"):
        build.source(DataConfig(f"{path}:val2014"))
    assert len(build.source(DataConfig(coco(tmp_path / "one", "val2017"), limit=2))) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": []}, "annotations[0]: image_id 9 is none of its images"),
        ({"annotations": [{"id": 1}]}, "annotations[0]: expected an object with `id`, `image_id` and `caption`"),
        ({"annotations": []}, "holds no record"),
        ({"images": None}, "expected COCO's `images` and `annotations`"),
    ],
)
def test_faults_of_coco(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=re.escape(message)):
        build.source(DataConfig(coco(tmp_path, "val2017", **changed)))


PROBLEM = {"question": "Which?", "choices": ["red", "blue"], "answer": 1, "hint": "Look.", "image": "image.png"}
TEXT = {**PROBLEM, "hint": "", "image": None, "answer": 0, "subject": "social science"}


def scienceqa(folder: Path, **problems: Any) -> str:
    problems = {"1": PROBLEM, "2": TEXT, **problems}
    files = {
        "problems.json": json.dumps(problems),
        "pid_splits.json": json.dumps({"train": ["2", "1"], "test": [name for name in problems if int(name) > 1]}),
        "images/train/1/image.png": None,
    }
    return write(folder, files)


def test_scienceqa(tmp_path: Path) -> None:
    asked = "Answer with the option's letter from the given choices directly."
    path = scienceqa(tmp_path / "sqa")
    text, image = build.source(DataConfig(f"{path}:train"))
    assert told(text) == ("2", [f"Which?\nContext: N/A\nOptions: (A) red (B) blue\n{asked}", "A"], [])
    assert text.capability == "social science"
    assert told(image) == (
        "1",
        [f"<image>\nWhich?\nContext: Look.\nOptions: (A) red (B) blue\n{asked}", "B"],
        ["image.png"],
    )
    assert image.where == "sqa:train[1] (id '1')"
    with pytest.raises(RecordError, match=r"sqa: has splits train, test; name one, as .*sqa:train"):
        build.source(DataConfig(path))
    with pytest.raises(RecordError, match="unknown split 'tran'; did you mean 'train'"):
        build.source(DataConfig(f"{path}:tran"))


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ({**TEXT, "answer": 2}, "problem '3': `answer` 2 is none of its choices"),
        ({"question": "Which?"}, "problem '3': expected an object with `question`, `choices` and `answer`"),
        (3, "problem '3': expected an object"),
    ],
)
def test_faults_of_scienceqa(problem: Any, message: str, tmp_path: Path) -> None:
    path = scienceqa(tmp_path, **{"3": problem})
    assert len(build.source(DataConfig(f"{path}:train"))) == 2
    with pytest.raises(RecordError, match=re.escape(message)):
        build.source(DataConfig(f"{path}:test"))
