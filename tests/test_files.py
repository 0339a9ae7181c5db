"""Files are there whole or not at all, and what a killed process left behind is removed."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest

from vlmzoo import files
from vlmzoo.files import StoredBytes, damage, whole_folder, write_whole


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


@dataclass(frozen=True)
class Part(StoredBytes):
    """A byte of a file, or of none on this machine."""

    number: int
    archive: Path | None
    read_by: list[int] = field(compare=False)

    @property
    def file(self) -> Path | None:
        return self.archive

    def __str__(self) -> str:
        return f"part {self.number}"

    def read(self) -> bytes:
        self.read_by.append(self.number)
        return bytes([self.number])


def test_hashes_of_stored_bytes_stand_with_their_file(tmp_path: Path) -> None:
    archive, read = tmp_path / "archive", []
    archive.write_text("x")
    os.utime(archive, ns=(1, 1))
    later = files.time.time_ns() + 10 * files.SETTLED
    parts = [Part(1, archive, read), Part(2, archive, read), Part(3, None, read)]
    with mock.patch.object(files.time, "time_ns", return_value=later):
        first = files.content_hashes(parts, tmp_path / "hashes")
        assert first[parts[1]] == hashlib.sha256(b"\2").hexdigest()
        assert sorted(read) == [1, 2, 3]
        assert files.content_hashes(parts, tmp_path / "hashes") == first
        assert sorted(read) == [1, 2, 3, 3]  # what no file says anything about is read again
        archive.write_text("other")
        files.content_hashes(parts, tmp_path / "hashes")
    assert sorted(read) == [1, 1, 2, 2, 3, 3, 3]
