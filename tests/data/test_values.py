import json
from pathlib import Path

import pytest

from vlmzoo.data import values as reading
from vlmzoo.data.values import values


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_values_come_one_by_one(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", block)
    content = [{"a": [1, {"b": "]},["}]}, 123, "x, ]", None, 1.5e-7, [], "é😀", True]
    file = tmp_path / "a.json"
    for text in (json.dumps(content), " \n\n" + json.dumps(content, indent=2, ensure_ascii=False)):
        file.write_text(text, encoding="utf-8")
        assert list(values(file)) == content
    file.write_text("[]")
    assert list(values(file)) == []
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(f"{json.dumps(value)}\n\n" for value in content))
    assert list(values(lines)) == content
    file.write_text('[{"a": 1')
    with pytest.raises(ValueError, match="ends in the middle"):
        list(values(file))
