import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmzoo.world import DATASETS, datasets, encoder, language
from vlmzoo.world.datasets import examples, write_dataset
from vlmzoo.world.scenes import Scene, draw
from vlmzoo.world.text import CAPABILITIES
from vlmzoo.world.tokenizer import build_tokenizer


def keys(scenes: Iterable[Scene]) -> set[str]:
    return {scene.key for scene in scenes}


def test_evaluation_scenes_occur_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scene that is drawn on each of the five ways is enumerated, whatever its split claims."""
    held_out = keys(scene for scene, _ in examples("questions", DATASETS["questions"], seed=0))
    assert len(held_out) > 1000
    used = {name: keys(scene for scene, _ in examples(name, 3000, seed=0)) for name in ("captions", "conversations")}
    batches = [encoder.scene_batch(0, step) for step in range(40)]
    used["encoder"] = keys(scene for scenes, _ in batches for scene in scenes)
    used["encoder's wrong captions"] = keys(scene for _, changed in batches for scene in changed)
    read: list[Scene] = []
    sample = language.sample_scene
    monkeypatch.setattr(language, "sample_scene", lambda *args: read.append(sample(*args)) or read[-1])
    vocabulary = build_tokenizer().get_vocab()
    for step in range(20):
        language.text_batch(0, step, vocabulary)
    used["language model"] = keys(read)
    assert len(read) == 20 * language.BATCH
    for name, found in used.items():
        assert len(found) > 500, name
        assert not found & held_out, name
    assert {scene.split for scene in read} == {"training"}


def test_files_hold_what_was_drawn(tmp_path: Path) -> None:
    file = write_dataset("conversations", tmp_path, 5, seed=3)
    records = json.loads(file.read_text())
    drawn = list(examples("conversations", 5, seed=3))
    assert [record["id"] for record in records] == [f"conversations-{number:06d}" for number in range(5)]
    for record, (scene, turns) in zip(records, drawn, strict=True):
        values = [turn["value"] for turn in record["conversations"]]
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * len(turns)
        assert values[0] == f"<image>\n{turns[0].text}"
        assert values[2::2] == [turn.text for turn in turns[1:]]
        assert values[1::2] == [turn.answer for turn in turns]
        assert np.array_equal(np.asarray(Image.open(file.parent / "images" / record["image"])), draw(scene))


def test_questions_name_their_capability(tmp_path: Path) -> None:
    records = json.loads(write_dataset("questions", tmp_path, 10, seed=0).read_text())
    assert [record["capability"] for record in records] == list(CAPABILITIES) * 2


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
