"""What fuzzing found: JSON that Python's decoder or a tokenizer would refuse in its own way is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmzoo import build
from vlmzoo.config import DataConfig
from vlmzoo.data.images import ImageError, load_image
from vlmzoo.data.records import RecordError

Write = Callable[[Any], Path]


def record(question: str = "Hello", answer: str = "Hi", **fields: Any) -> dict[str, Any]:
    return {
        "id": "a",
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **fields,
    }


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"id": ' + '{"a": ' * 100_000, "[" + "9" * 5000 + "]"])
def test_what_the_decoder_cannot_hold(text: str, write: Write, image_folder: Path) -> None:
    with pytest.raises(RecordError, match=r"train\.json(\[0\])?: (nested too deeply|not valid JSON)"):
        list(build.source(DataConfig(str(write(text)), str(image_folder))))


@pytest.mark.parametrize(
    "value",
    [record("\ud800"), record(answer="red \udcff"), record(id="\ud800"), record(description="a \ud800")],
)
def test_half_a_character(value: dict[str, Any], write: Write, image_folder: Path) -> None:
    path = write(json.dumps([record(), value]))
    with pytest.raises(RecordError, match=r"^train\.json\[1\] .* is no text: half a character .* at \d") as caught:
        list(build.source(DataConfig(str(path), str(image_folder))))
    str(caught.value).encode()


@pytest.mark.parametrize(
    "value",
    [
        record(id="x" * 100_000, image="absent.png"),
        record("<image>", image="x" * 100_000),
        record("<image>", image=["x" * 100_000, 7]),
        {"id": "a", "conversations": [{"from": "x" * 100_000, "value": "Hello"}]},
        {"id": ["x"] * 100_000, "conversations": 7},
    ],
)
def test_a_long_value_makes_no_long_message(value: dict[str, Any], write: Write, image_folder: Path) -> None:
    with pytest.raises((RecordError, ImageError)) as caught:
        list(build.source(DataConfig(str(write([value])), str(image_folder))))
    assert len(str(caught.value)) < 1000
    assert str(caught.value).startswith("train.json[0]")


def test_an_image_keeps_the_format_of_its_content(image_folder: Path) -> None:
    assert load_image(image_folder / "a.png").format == "PNG"
    (image_folder / "a.jpg").write_bytes((image_folder / "a.png").read_bytes())
    assert load_image(image_folder / "a.jpg").format == "PNG"
