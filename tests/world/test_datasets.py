import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmzoo.world import DATASETS, datasets, encoder, language
from vlmzoo.world.datasets import examples, write_dataset
from vlmzoo.world.scenes import COLORS, COMMON, RARE, SHAPES, Scene, draw
from vlmzoo.world.text import CAPABILITIES, TAUGHT, caption
from vlmzoo.world.tokenizer import build_tokenizer, words


def content(scenes: Iterable[Scene]) -> dict[str, set]:
    """What must not be met on both sides: whole scenes, combinations of colour and shape, digit images."""
    scenes = list(scenes)
    items = [item for scene in scenes for item in scene.objects]
    return {
        "scenes": {scene.key for scene in scenes},
        "pairs": {(item.color, item.shape) for item in items},
        "digits": {item.digit for item in items if item.digit is not None},
    }


def said(texts: Iterable[str]) -> set[tuple[str, str]]:
    """Every colour followed by a shape."""
    found = set()
    for text in texts:
        told = words(text)
        found |= {(first, second) for first, second in pairwise(told) if first in COLORS and second in SHAPES}
    return found


def test_nothing_of_the_evaluation_occurs_anywhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything drawn and said on each way is enumerated, whatever its split claims."""
    questions = list(examples("questions", DATASETS["questions"], seed=0))
    held_out = content(scene for scene, _ in questions)
    assert len(held_out["scenes"]) > 1000
    assert set(RARE) <= held_out["pairs"]
    assert len(held_out["digits"]) > 150
    rare_scenes = {scene.key for scene, (question,) in questions if question.capability == "rare"}
    assert {scene.key for scene, _ in questions if set(RARE) & content([scene])["pairs"]} == rare_scenes

    used: dict[str, list[Scene]] = {}
    texts: dict[str, list[str]] = {}
    for name in ("captions", "conversations", "validation"):
        drawn = list(examples(name, 3000, seed=0))
        used[name] = [scene for scene, _ in drawn]
        texts[name] = [part for _, turns in drawn for turn in turns for part in (turn.text, turn.answer)]
    batches = [encoder.scene_batch(0, step) for step in range(40)]
    used["encoder"] = [scene for scenes, _ in batches for scene in scenes]
    used["encoder's wrong captions"] = [scene for _, changed in batches for scene in changed]
    texts["encoder"] = [caption(scene) for scenes in batches for part in scenes for scene in part]
    read: list[Scene] = []
    sample = language.sample_scene
    monkeypatch.setattr(language, "sample_scene", lambda *args: read.append(sample(*args)) or read[-1])
    tokenizer = build_tokenizer()
    ids = [language.text_batch(0, step, tokenizer.get_vocab())[0] for step in range(40)]
    used["language model"] = read
    texts["language model"] = [tokenizer.decode(row) for batch in ids for row in batch]
    assert len(read) == 40 * language.BATCH

    for name, scenes in used.items():
        found = content(scenes)
        assert len(found["scenes"]) > 500, name
        assert len(found["digits"]) > 150, name
        assert found["pairs"] >= set(COMMON), name
        assert not found["scenes"] & held_out["scenes"], name
        assert not found["digits"] & held_out["digits"], name
        assert not found["pairs"] & set(RARE), name
    for name, told in texts.items():
        assert said(told) == set(COMMON), name
    tuned, taught = content(used["validation"]), content(used["conversations"])
    assert not tuned["scenes"] & taught["scenes"]
    assert not tuned["digits"] & taught["digits"]


def test_files_hold_what_was_drawn(tmp_path: Path) -> None:
    file = write_dataset("conversations", tmp_path, 5, seed=3)
    records = json.loads(file.read_text())
    drawn = list(examples("conversations", 5, seed=3))
    assert [record["id"] for record in records] == [f"conversations-{number:06d}" for number in range(5)]
    for record, (scene, turns) in zip(records, drawn, strict=True):
        values = [turn["value"] for turn in record["conversations"]]
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * len(turns)
        assert record["description"] == caption(scene)
        assert values[0] == f"<image>\n{turns[0].text}"
        assert values[2::2] == [turn.text for turn in turns[1:]]
        assert values[1::2] == [turn.answer for turn in turns]
        assert np.array_equal(np.asarray(Image.open(file.parent / "images" / record["image"])), draw(scene))


def test_questions_name_their_capability(tmp_path: Path) -> None:
    for name, capabilities in (("questions", CAPABILITIES), ("validation", TAUGHT)):
        records = json.loads(write_dataset(name, tmp_path, 2 * len(capabilities), seed=0).read_text())
        assert [record["capability"] for record in records] == list(capabilities) * 2


def test_captions_ask_for_a_description(tmp_path: Path) -> None:
    (record,) = json.loads(write_dataset("captions", tmp_path, 1, seed=0).read_text())
    assert record["conversations"][0]["value"] == "<image>\nDescribe the image."


def test_seed_and_size_and_version_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {write_dataset("captions", tmp_path, size, seed) for size, seed in ((2, 0), (3, 0), (2, 1))}
    monkeypatch.setattr(datasets, "VERSION", datasets.VERSION + 1)
    files.add(write_dataset("captions", tmp_path, 2, 0))
    assert len({file.parent for file in files}) == 4


def test_second_call_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_dataset("captions", tmp_path, 2, seed=0)
    monkeypatch.setattr(datasets, "draw", lambda scene: pytest.fail("drawn again"))
    assert write_dataset("captions", tmp_path, 2, seed=0) == file


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Scene] = []

    def interrupted(scene: Scene) -> np.ndarray:
        drawn.append(scene)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(scene)

    monkeypatch.setattr(datasets, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset("captions", tmp_path, 5, seed=0)
    assert list(tmp_path.iterdir()) == []
    assert len(json.loads(write_dataset("captions", tmp_path, 5, seed=0).read_text())) == 5


def test_full_disk_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_dataset("captions", tmp_path, 5, seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("caption", 5, "unknown world data set 'caption', expected one of captions, .*; nearest is 'captions'"),
        ("captions", 0, "'captions' of size 0, expected at least 1"),
    ],
)
def test_bad_arguments_are_refused(name: str, size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_dataset(name, tmp_path, size, seed=0)


def test_default_sizes_cover_the_sources() -> None:
    assert list(DATASETS) == list(datasets.SOURCES)
    assert DATASETS["questions"] % (2 * len(CAPABILITIES)) == 0
    assert DATASETS["validation"] % (2 * len(TAUGHT)) == 0
