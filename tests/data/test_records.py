from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmzoo import build
from vlmzoo.config import DataConfig
from vlmzoo.data.images import ImageError
from vlmzoo.data.records import Record, RecordError, Turn

Write = Callable[[Any], Path]


def read_records(file: Path, images: Path, limit: int | None = None) -> list[Record]:
    return list(build.source(DataConfig(str(file), str(images), limit=limit)))


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def record(*texts: str, **fields: Any) -> dict[str, Any]:
    return {"id": "abc", "conversations": conversation(*texts), **fields}


GOOD = record("<image>\nWhat is it?", "A cube.", image="a.png")


def test_reads_images_texts_and_text_only_records(write: Write, image_folder: Path) -> None:
    several = record("<image> or <image>?", "The first.", "Why?", "It is red.", image=["sub/b.jpg", "a.png"], id=7)
    text_only = {"conversations": conversation("Hello", "Hi"), "capability": "manners"}
    one, two, three = read_records(write([GOOD, several, text_only]), image_folder)
    assert one.images == (image_folder.resolve() / "a.png",)
    assert one.turns == (Turn("human", "<image>\nWhat is it?"), Turn("gpt", "A cube."))
    assert one.where == "train.json[0] (id 'abc')"
    assert two.id == "7"
    assert [path.name for path in two.images] == ["b.jpg", "a.png"]
    assert len(two.turns) == 4
    assert (three.id, three.images, three.capability) == ("2", (), "manners")


def test_a_record_can_be_read_without_its_images(write: Write, image_folder: Path) -> None:
    value = record("<image>\nIs <image> it?", "No.", "Why?", "It.", image=["a.png", "a.png"], description="a cube .")
    (one,) = read_records(write([value]), image_folder)
    blind, told = one.seen_as(None), one.seen_as(one.description)
    assert blind.images == told.images == ()
    assert [turn.text for turn in blind.turns] == ["Is  it?", "No.", "Why?", "It."]
    assert [turn.text for turn in told.turns] == ["a cube .\nIs a cube . it?", "No.", "Why?", "It."]
    assert (told.id, told.where) == (one.id, one.where)


def test_limit_reads_only_the_first(write: Write, image_folder: Path) -> None:
    path = write([GOOD, GOOD, "broken"])
    assert len(read_records(path, image_folder, limit=2)) == 2
    with pytest.raises(RecordError, match=r"limit 0 leaves no record"):
        read_records(path, image_folder, limit=0)


FAULTS = {
    "no token": (record("What is it?", "A cube.", image="a.png"), "0 <image> in its human turns for 1 images"),
    "too many tokens": (record("<image><image>", "A cube.", image="a.png"), "2 <image> .* for 1 images"),
    "too few tokens": (record("<image>", "A cube.", image=["a.png", "a.png"]), "1 <image> .* for 2 images"),
    "token without image": (record("<image>", "A cube."), "1 <image> .* for 0 images"),
    "token in an answer": (record("Hi", "<image>", image="a.png"), "turn 1: the answer holds <image>"),
    "no answer": (record("<image>", image="a.png"), "last human turn has no answer"),
    "no second answer": (record("<image>", "A.", "And?", image="a.png"), "last human turn has no answer"),
    "empty answer": (record("<image>", " \n", image="a.png"), "turn 1: the answer is empty"),
    "gpt first": (
        {"id": "abc", "conversations": [{"from": "gpt", "value": "A."}]},
        "turn 0 is from 'gpt', expected 'human'",
    ),
    "two humans": (
        {"id": "abc", "conversations": [{"from": "human", "value": "A."}] * 2},
        "turn 1 is from 'human', expected 'gpt'",
    ),
    "unknown role": (
        {"id": "abc", "conversations": [{"from": "system", "value": "A."}]},
        "turn 0 is from 'system', expected 'human'",
    ),
    "description is no text": (
        record("<image>", "A.", image="a.png", description=["a"]),
        "`description` must be a text, got a list",
    ),
    "no conversations": ({"id": "abc"}, "`conversations` must be a list of turns, got nothing"),
    "empty conversations": ({"id": "abc", "conversations": []}, "got an empty list"),
    "value no text": (
        {"id": "abc", "conversations": [{"from": "human", "value": 3}]},
        "turn 0: expected an object with texts",
    ),
    "image no path": (record("<image>", "A.", image=3), "`image` must be a path or a list of paths, got 3"),
    "image null": (record("Hi", "A.", image=None), "`image` must be a path .* got None"),
    "capability no text": (record("Hi", "A.", capability=3), "`capability` must be a text, got a number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_the_record(fault: str, write: Write, image_folder: Path) -> None:
    value, message = FAULTS[fault]
    with pytest.raises(RecordError, match=rf"^train\.json\[1\] \(id 'abc'\):? .*{message}") as caught:
        read_records(write([GOOD, value]), image_folder)
    assert "\n" not in str(caught.value)


def test_a_record_that_is_no_object(write: Write, image_folder: Path) -> None:
    with pytest.raises(RecordError, match=r"train\.json\[1\]: expected an object .* got a text"):
        read_records(write([GOOD, "abc"]), image_folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"id": 1,\n]', r"train\.json\[0\]: not valid JSON at line 3"),
        ("", r"not valid JSON at line 1"),
        ("[]", r"holds no record"),
        ('{"id": 1}', r"expected a list of records, got an object"),
    ],
)
def test_broken_files(text: str, message: str, write: Write, image_folder: Path) -> None:
    with pytest.raises(RecordError, match=message):
        read_records(write(text), image_folder)


def test_unreadable_files(tmp_path: Path, image_folder: Path, write: Write) -> None:
    with pytest.raises(RecordError, match=r"absent\.json: no such file; expected LLaVA JSON"):
        read_records(tmp_path / "absent.json", image_folder)
    latin = tmp_path / "latin.json"
    latin.write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(RecordError, match=r"latin\.json\[0\]: cannot be read"):
        read_records(latin, image_folder)
    with pytest.raises(RecordError, match=r"no image folder .*nowhere"):
        read_records(write([GOOD]), tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "link.png", "sub/../../secret.png", "way/secret.png"])
def test_images_stay_in_their_folder(name: str, write: Write, image_folder: Path) -> None:
    secret = image_folder.parent / "secret.png"
    secret.write_bytes((image_folder / "a.png").read_bytes())
    (image_folder / "link.png").symlink_to(secret)
    (image_folder / "way").symlink_to(image_folder.parent)
    with pytest.raises(
        ImageError, match=rf"^train\.json\[0\] \(id 'abc'\): image '{name}' lies outside the image folder"
    ):
        read_records(write([record("<image>", "A.", image=name)]), image_folder)


@pytest.mark.parametrize("name", ["absent.png", "sub", "a.png\0", "x" * 5000])
def test_missing_images(name: str, write: Write, image_folder: Path) -> None:
    with pytest.raises(ImageError, match=r"^train\.json\[0\] \(id 'abc'\): image "):
        read_records(write([record("<image>", "A.", image=name)]), image_folder)


def test_links_within_the_folder_and_to_it_are_followed(write: Write, image_folder: Path) -> None:
    (image_folder / "link.png").symlink_to(image_folder / "a.png")
    (image_folder.parent / "folder").symlink_to(image_folder)
    (found,) = read_records(write([record("<image>", "A.", image="link.png")]), image_folder.parent / "folder")
    assert found.images == (image_folder.resolve() / "a.png",)
