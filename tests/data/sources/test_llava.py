"""Records of JSON are found without parsing it: the same as parsing finds, whatever the texts hold."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.sources.conftest import told, write_json
from vlmzoo import build
from vlmzoo.config import DataConfig
from vlmzoo.data.records import RecordError
from vlmzoo.data.sources import llava, scan

LINE_3 = "not valid JSON at line 3: Expecting value"
TEXT = st.text(alphabet='\\"[]{},:Yy_\x7f\n é…', max_size=12) | st.builds(
    lambda before, number, after: before + "\\" * number + after,
    *(st.text('a"', max_size=3), st.integers(0, 200), st.text('",')),
)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(values=st.lists(VALUE, min_size=1, max_size=6), indent=st.sampled_from([None, 1]), ascii=st.booleans())
@pytest.mark.parametrize("chunk", [1, 7, 64, 192, 1 << 18])
def test_the_scan_finds_what_parsing_finds(chunk: int, values: list[Any], indent: int | None, ascii: bool) -> None:
    data = (json.dumps(values, indent=indent, ensure_ascii=ascii) + "\n").encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "opened", lambda file: Slow(data, chunk))
        bounds, end = scan.json_list(Path("data.json"))
    assert data[end - 1 :] == b"]\n"
    assert bounds[-1] == end
    assert [json.loads(data[a : b - 1]) for a, b in itertools.pairwise(bounds)] == values


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(VALUE, min_size=1, max_size=6), size=st.integers(1, 40), tail=st.sampled_from(["", "]", '}}, "'])
)
@pytest.mark.parametrize("between", [scan.BETWEEN.pattern, rb"[^\0]"])
def test_parts_of_a_list_find_what_the_whole_finds(between: bytes, values: list[Any], size: int, tail: str) -> None:
    """Cut between objects, and cut anywhere: in texts, behind backslashes, behind the list."""
    data = (json.dumps(values, ensure_ascii=False) + tail).encode()
    found = []
    for part, chunk in ((1 << 27, 1 << 18), (size, 1 << 18), (size, 5)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scan, "opened", lambda file, chunk=chunk: Slow(data, chunk))
            patch.setattr(scan, "PART", part)
            patch.setattr(scan, "BETWEEN", re.compile(between))
            found.append(scan.json_list(Path("data.json")))
    assert found[2][0].tolist() == found[1][0].tolist() == found[0][0].tolist()
    assert found[2][1] == found[1][1] == found[0][1] == len(json.dumps(values, ensure_ascii=False).encode())


class Slow(io.BytesIO):
    """Gives less than it is asked for, as a stream may."""

    def __init__(self, data: bytes, most: int) -> None:
        super().__init__(data)
        self._most = most

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self._most if size is None or size < 0 else min(size, self._most))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1}\n{"id": 2}]', "not valid JSON at line 2: Extra data"),
        ('[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},\n\n]', LINE_3),
        ('[{"id": "a\n', "not valid JSON at line 1: Invalid control character at"),
        ('[{"id": 1}, {"id": 2}', "not valid JSON at line 1: Expecting ',' delimiter"),
        ('[{"id": 1}]\n\n]', "not valid JSON at line 3: Extra data"),
        ('[{"id": 1}}\n', "not valid JSON at line 1: Expecting ',' delimiter"),
        ('"text"', "expected a list of records, got a text"),
        ("nonsense", "expected a list of records, got nothing"),
        ("[1, 2]", r"data.json[0]: expected an object with `conversations`, got a number"),
    ],
)
def test_broken_json(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(RecordError, match=re.escape(message)):
        list(build.source(DataConfig(str(tmp_path / "data.json"))))


def test_broken_lines(tmp_path: Path, values: list[dict[str, Any]]) -> None:
    write_json(tmp_path, values)
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(values[0]) + "\n\n\n{\n" + json.dumps(values[1]))
    source = build.source(DataConfig(str(file)))
    assert (len(source), source[0].id, source[2].id) == (3, "r0", "r1")
    with pytest.raises(RecordError, match=r"data\.jsonl\[1\]: not valid JSON at line 4: Expecting property name"):
        source[1]
    file.write_text(json.dumps(values[0]) + "\n{")
    assert len(build.source(DataConfig(str(file)))) == 2
    with pytest.raises(RecordError, match=r"data\.jsonl\[1\]: not valid JSON at line 2"):
        build.source(DataConfig(str(file)))[1]
    file.write_text("\n\n")
    with pytest.raises(RecordError, match="holds no record"):
        build.source(DataConfig(str(file)))


def test_a_faulty_record_is_refused_when_it_is_read(tmp_path: Path, values: list[dict[str, Any]]) -> None:
    values[3]["conversations"].pop()
    source = build.source(DataConfig(write_json(tmp_path, values)))
    assert source[2].id == "r2"
    with pytest.raises(RecordError, match=r"data\.json\[3\] \(id 'r3'\): the last human turn has no answer"):
        source[3]


def test_the_index_of_a_large_file_is_kept(
    tmp_path: Path, values: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLMZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(llava, "LARGE", 1)
    path = write_json(tmp_path, values)
    scans = []
    real = scan.json_list
    monkeypatch.setattr(llava, "json_list", lambda file: scans.append(file) or real(file))
    whole = told(build.source(DataConfig(path)))
    assert told(build.source(DataConfig(path))) == whole
    assert len(scans) == 1
    (kept,) = (tmp_path / "cache" / "indexes").glob("*/bounds.npy")
    kept.write_bytes(kept.read_bytes()[:-1] + b"\1")
    assert told(build.source(DataConfig(path))) == whole
    assert "does not match its hash; computing it again" in capsys.readouterr().err
    write_json(tmp_path, values[:-1])  # another file of this name
    assert told(build.source(DataConfig(path))) == whole[:-1]
    assert len(scans) == 3
