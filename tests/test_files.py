"""Files are there whole or not at all, and what a killed process left behind is removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmzoo.files import damage, whole_folder, write_whole


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "00000001"
    with whole_folder(place) as aside:
        (aside / "a.txt").write_text("a")
        assert not place.exists()
    assert damage(place) is None
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    place = tmp_path / "00000001"
    left = whole_folder(place)
    (left.__enter__() / "half.txt").write_text("half")  # killed here: nothing leaves the context
    with whole_folder(place) as aside:
        (aside / "a.txt").write_text("a")
    assert sorted(path.name for path in place.iterdir()) == ["a.txt", "sha256.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


def test_a_folder_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    place = tmp_path / "model"
    for text in ("first", "second"):
        with whole_folder(place) as aside:
            (aside / "a.txt").write_text(text)

    def fail() -> None:
        with whole_folder(place) as aside:
            (aside / "a.txt").write_text("third")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (place / "a.txt").read_text() == "second"
    assert damage(place) is None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damage_is_named(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "model") as aside:
        (aside / "a.txt").write_text("a")
    (tmp_path / "model" / "a.txt").write_text("b")
    assert damage(tmp_path / "model") == f"{tmp_path / 'model' / 'a.txt'}: does not match its hash"


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "result.json"
    write_whole(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*result.json"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
