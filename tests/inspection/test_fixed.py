"""The fixed copy is sound, keeps what was good as it was, and says what became of the rest."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.data.damage import SUBJECTS, Case
from tests.inspection.conftest import RECORDS, record
from tests.inspection.test_check import subject
from vlmzoo.config import DataConfig
from vlmzoo.inspection import fixed
from vlmzoo.inspection.check import check
from vlmzoo.inspection.fixed import Fixed, write_fixed
from vlmzoo.inspection.subject import of_data

LEFT_OUT = {2, 3, 4, 7, 11, 12, 13, 14, 15, 16}
MENDED = {1, 5, 6}


def fix(data: Path, folder: Path) -> tuple[Fixed, list[Any], list[dict[str, Any]]]:
    before = {file: file.read_bytes() for file in data.parent.rglob("*") if file.is_file()}
    found = subject(data)
    written = write_fixed(found, check(found, 2), folder, 2)
    assert {file: file.read_bytes() for file in before} == before, "the input was changed"
    changes = [json.loads(line) for line in (folder / "changes.jsonl").read_text().splitlines()]
    return written, json.loads(written.file.read_text()), changes


def test_the_copy_is_sound_and_tells_what_was_done(data: Path, tmp_path: Path) -> None:
    written, records, changes = fix(data, tmp_path / "fixed")
    assert (written.records, written.mended, written.left_out) == (8, len(MENDED), len(LEFT_OUT))
    assert {change["index"] for change in changes if change["done"] == "left out"} == LEFT_OUT
    assert {change["index"] for change in changes if change["done"] == "mended"} == MENDED
    again = check(subject(written.file), 1)
    assert not again.faulty
    assert "wrong-extension" not in {finding.kind for finding in again.findings}
    untouched = [RECORDS[index] for index in range(len(RECORDS)) if index not in LEFT_OUT | MENDED]
    assert [value for value in records if value["id"] not in ("gif", "none", "two")] == untouched


def test_what_can_be_mended_in_one_way_is(data: Path, tmp_path: Path) -> None:
    _, records, _ = fix(data, tmp_path / "fixed")
    by_name = {value["id"]: value for value in records}
    assert by_name["gif"]["image"] == "g.gif"
    assert (tmp_path / "fixed" / "images" / "g.gif").read_bytes() == (data.parent / "images" / "g.jpg").read_bytes()
    assert by_name["none"]["conversations"][0]["value"] == "<image>\nWhat?"
    texts = [turn["value"] for turn in by_name["two"]["conversations"]]
    assert texts == ["<image>\nWhat is it?", "red", "And ?", "blue"]


def test_a_mended_record_with_another_fault_is_left_out(data: Path, tmp_path: Path) -> None:
    data.write_text(json.dumps([record("a", "What?", "red", image="half.jpg"), RECORDS[0]]))
    written, records, changes = fix(data, tmp_path / "fixed")
    assert records == [RECORDS[0]]
    assert [(change["index"], change["done"]) for change in changes] == [(0, "left out")]
    assert written.left_out == 1


def test_an_image_whose_right_name_is_taken_keeps_its_own(data: Path, tmp_path: Path) -> None:
    images = data.parent / "images"
    (images / "g.gif").write_bytes((images / "a.jpg").read_bytes())
    data.write_text(json.dumps(RECORDS[:2]))
    _, records, changes = fix(data, tmp_path / "fixed")
    assert records == RECORDS[:2]
    assert changes == []


def test_where_files_cannot_be_linked_they_are_copied(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(fixed.os, "link", refuse)
    fix(data, tmp_path / "fixed")
    copied = tmp_path / "fixed" / "images" / "a.jpg"
    assert copied.read_bytes() == (data.parent / "images" / "a.jpg").read_bytes()
    assert copied.stat().st_nlink == 1


def test_nothing_is_written_over_and_nothing_but_json_is_mended(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.json is there already"):
        fix(data, data.parent)
    (other,) = of_data(DataConfig(str(tmp_path / "x.parquet")))
    with pytest.raises(ValueError, match="expected a LLaVA JSON or JSONL file"):
        write_fixed(other, check(subject(data), 1), tmp_path / "fixed", 1)
    data.write_text("[{")
    (broken,) = of_data(DataConfig(str(data)))
    with pytest.raises(ValueError, match="nothing can be mended"):
        write_fixed(broken, check(broken, 1), tmp_path / "fixed", 1)


@pytest.mark.parametrize("what", ["record", "json file", "png", "gif"])
def test_whatever_is_damaged_the_copy_is_sound_and_no_record_is_lost(what: str, tmp_path: Path) -> None:
    for seed in range(0, 400, 29):
        folder = tmp_path / str(seed)
        folder.mkdir()
        case = Case(what, seed)
        SUBJECTS[what](case, folder, random.Random(f"{case}"))
        found = subject(folder / "train.json")
        report = check(found, 1)
        if any(finding.index is None and finding.severity == "error" for finding in report.findings):
            continue  # no list of records at all
        written = write_fixed(found, report, folder / "fixed", 1)
        assert written.records + written.left_out == report.records
        if written.records:
            assert not check(subject(written.file), 1).faulty, case
