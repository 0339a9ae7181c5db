"""A folder with one record for everything that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ASK = "<image>\nWhat is it?"


def record(name: str, *texts: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    return {"id": name, "conversations": turns, **fields}


RECORDS: list[Any] = [
    record("good", ASK, "red", image="a.jpg", source={"kept": 1.5}),
    record("gif", ASK, "red cube", image="g.jpg"),
    record("half", ASK, "red", image="half.jpg"),
    record("missing", ASK, "red", image="absent.jpg"),
    record("outside", ASK, "red", image="../train.json"),
    record("none", "What?", "red", image="a.jpg"),
    record("two", ASK, "red", "And <image>?", "blue", image="a.jpg"),
    record("empty", ASK, " ", image="a.jpg"),
    record("copy", ASK, "red", image="a.jpg"),
    record("good", "Hello", "Hi"),
    record("long answer", ASK, "red " * 100, image="a.jpg"),
    record("long question", "why " * 100, "red"),
    record("marker", "Hello", "Hi </s> there"),
    7,
    record("images", "<image>" * 3, "red", image=["a.jpg"] * 3),
    record("huge", ASK, "red", image="huge.png"),
    record("turns", "Hello", "Hi", "Why"),
    record("long last", "Hello", "Hi", "So?", "red " * 10, "Why?", "it is " * 40),
]
MAX_LENGTH = 105
FOUND = [  # with world:llama, world:clip and mlp, whose images take 36 tokens
    (1, "wrong-extension"),
    (2, "broken-image"),
    (3, "missing-image"),
    (4, "image-outside"),
    (5, "image-count"),
    (6, "image-count"),
    (7, "empty-answer"),
    (8, "duplicate-record"),
    (9, "duplicate-id"),
    (10, "cut-targets"),
    (11, "no-target"),
    (12, "template"),
    (13, "bad-structure"),
    (14, "images-cut"),
    (15, "too-many-pixels"),
    (16, "bad-structure"),
    (17, "cut-targets"),
    (None, "image-unused"),
]
WARNINGS = {"wrong-extension", "duplicate-record", "duplicate-id", "cut-targets", "truncated", "image-unused"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """`train.json` with RECORDS, and its images."""
    images = tmp_path / "images"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.save(images / "a.jpg")
    image.save(images / "g.jpg", format="GIF")
    image.save(images / "unused.png")
    image.save(images / "half.jpg")
    content = (images / "half.jpg").read_bytes()
    (images / "half.jpg").write_bytes(content[: len(content) // 2])
    Image.new("1", (9000, 9000)).save(images / "huge.png")
    file = tmp_path / "train.json"
    file.write_text(json.dumps(RECORDS))
    return file
