"""COCO's files: read a piece at a time, joined as COCO means them, and every fault named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.instruct import coco
from vlmzoo.instruct import members
from vlmzoo.instruct.annotations import AnnotationError, Thing, read_coco


def test_an_image_has_its_captions_and_boxes_from_0_to_1(tmp_path: Path) -> None:
    found = read_coco(coco.write(tmp_path))
    assert len(found) == 3
    facts = found[1]
    assert (facts.id, facts.file_name, facts.size) == (11, "000001.jpg", (640, 480))
    assert facts.captions == tuple(item["caption"] for item in coco.captions(3) if item["image_id"] == 11)
    assert facts.things[0] == Thing("person", (0.1, 0.2, 0.3, 0.8))
    assert [thing.category for thing in facts.things] == ["person", "dog", "frisbee"]
    assert found.categories == coco.CATEGORIES
    assert found.faults.counts == {}


def test_a_crowd_is_said_to_be_one(tmp_path: Path) -> None:
    boxes = coco.instances(1)
    boxes[0]["iscrowd"] = 1
    (facts,) = read_coco(coco.write(tmp_path, 1, instances=boxes))
    assert [thing.crowd for thing in facts.things] == [True, False, False]


def test_several_files_and_any_order_give_the_same(tmp_path: Path) -> None:
    whole = read_coco(coco.write(tmp_path / "whole", 4))
    other = coco.write(tmp_path / "parts", 4, captions=coco.captions(4)[::-1], images=coco.images(4)[::-1])
    file = other / "annotations" / "instances_val2017.json"
    document = json.loads(file.read_text())
    for name, part in (("a", slice(0, 5)), ("b", slice(5, None))):
        reordered = {"annotations": document["annotations"][part], **{k: document[k] for k in ("categories", "images")}}
        file.with_name(f"instances_{name}.json").write_text(json.dumps(reordered))
    file.unlink()
    parts = read_coco(other)
    assert [facts.things for facts in parts] == [facts.things for facts in whole]
    assert [sorted(facts.captions) for facts in parts] == [sorted(facts.captions) for facts in whole]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_where_a_chunk_ends_does_not_matter(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    document = {"n": 12345, "s": 'a\\u00e9"]}', "l": [1.5, {"x": [1, {}]}, "é", None, True], "e": [], "o": {"p": []}}
    file.write_text(json.dumps(document, indent=1, ensure_ascii=False))
    monkeypatch.setattr(members, "CHUNK", chunk)
    lists = {key: value if isinstance(value, list) else [value] for key, value in document.items()}
    expected = [(key, item) for key, items in lists.items() for item in items]
    assert list(members.members(file)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"images": [',
        '{"images": [{"id": 1]',
        '{"images": [1 2]}',
        '{"a": 1} x',
        '{"a" 1}',
        '{"a": 1 "b"}',
    ],
)
def test_broken_json_is_one_line_with_the_place(text: str, tmp_path: Path) -> None:
    folder = coco.write(tmp_path)
    file = folder / "annotations" / "captions_val2017.json"
    file.write_text(text)
    with pytest.raises(members.MembersError, match=r"captions_val2017.json: not valid JSON behind character \d+: "):
        read_coco(folder)


def with_fault(kind: str, **change: Any) -> dict[str, Any]:
    items = {"captions": coco.captions, "instances": coco.instances, "images": coco.images}[kind](3)
    items[1] |= change
    return {kind: items}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (with_fault("captions", image_id=99), "annotation of an unknown image, first caption of 99"),
        (with_fault("captions", image_id=None), "annotation of an unknown image, first captions_val2017.json: item"),
        (with_fault("captions", caption=7), "caption without text, first captions_val2017.json: item"),
        (with_fault("captions", caption=" "), "caption without text"),
        (with_fault("instances", image_id=99), "annotation of an unknown image, first box of 99"),
        (with_fault("instances", category_id=9), "annotation of an unknown category, first category 9"),
        (with_fault("instances", category_id="dog"), "annotation of an unknown category"),
        (with_fault("instances", bbox=[600, 0, 100, 10]), "box outside its image, first in image 10"),
        (with_fault("instances", bbox=[-9, 0, 100, 10]), "box outside its image"),
        (with_fault("instances", bbox=[5, 5, 0, 10]), "box without an area, first in image 10"),
        (with_fault("instances", bbox=[5, 5, -3, 10]), "box without an area"),
        (with_fault("instances", bbox=[5, 5, float("nan"), 10]), "box with NaN or infinity"),
        (with_fault("instances", bbox=[5, 5, 10**400, 10]), "box with NaN or infinity"),
        (with_fault("instances", bbox="all"), "box that is not four numbers"),
        (with_fault("instances", bbox=[1, 2, 3]), "box that is not four numbers"),
        (with_fault("images", file_name="../a.jpg"), "image without a usable file_name"),
        (with_fault("images", width=0), "image without a usable width and height"),
        (with_fault("images", id="one"), "image without a usable id"),
        ({"captions": coco.captions(2)}, "image without captions, first image 12"),
        ({"instances": [*coco.instances(3), 5]}, "annotations: no object"),
    ],
)
def test_one_fault_is_counted_and_the_rest_is_read(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    found = read_coco(coco.write(tmp_path, **change))
    assert any(expected in line for line in found.faults.lines()), found.faults.lines()
    assert len(found) >= 2
    assert all(0 <= value <= 1 for facts in found for thing in facts.things for value in thing.box)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"captions": []}, "none of its 3 images has a caption"),
        ({"images": []}, "none of its 0 images has a caption"),
        ({"images": [*coco.images(3), {**coco.images(1)[0], "width": 9}]}, "image id 10 is '000000.jpg' and also"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "category 1 is 'b' here"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=expected):
        read_coco(coco.write(tmp_path, **change))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="no such folder"):
        read_coco(tmp_path / "none")
    with pytest.raises(AnnotationError, match=r"no annotations/captions_\*.json"):
        read_coco(tmp_path)
    (coco.write(tmp_path) / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(AnnotationError, match=r"no annotations/instances_\*.json"):
        read_coco(tmp_path)


def test_a_box_may_stand_out_by_a_pixels_rounding(tmp_path: Path) -> None:
    found = read_coco(coco.write(tmp_path, **with_fault("instances", bbox=[600, 400, 40.6, 80.6])))
    assert found.faults.counts == {}
    assert found[0].things[1].box == (0.938, 0.833, 1.0, 1.0)
