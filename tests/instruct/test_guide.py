"""docs/instruct.md: its commands run in its order, and its tables name all there is."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.instruct import coco
from tests.instruct.server import completion, serving, turns
from vlmzoo import build, cli
from vlmzoo.config import DataConfig
from vlmzoo.instruct import duplicates, gate, grounding
from vlmzoo.instruct.teachers import TEACHERS

PAGE = (Path(__file__).parents[2] / "docs/instruct.md").read_text(encoding="utf-8")


def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLMZOO_CACHE", str(tmp_path / "cache"))
    coco.write(Path("data/coco"), 160)
    commands = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    with serving(lambda index, text: completion(turns(index))) as server:
        for command in commands:
            words = shlex.split(command.replace("http://localhost:8000/v1", server.url))
            assert words[0] == "vlmzoo"
            assert cli.main(words[1:]) == 0, command
        assert len(server.asked) == 158
    (images,) = re.findall(r"instruct.json: \d+ records, images in (\S+)", capsys.readouterr().out)
    assert len(build.source(DataConfig("data/instruct.json", str(images)))) > 400
    assert len(json.loads(Path("data/coco-instruct.json").read_text())) == 58
    named = re.findall(r"^\| `(instruct\S+)` \|", PAGE, flags=re.MULTILINE)
    assert all((Path("data") / name).is_file() for name in named)
    assert len(named) == 4


def test_its_tables_name_every_reason_and_teacher() -> None:
    sources = [Path(module.__file__ or "").read_text() for module in (gate, grounding, duplicates)]
    said = {reason for text in sources for reason in re.findall(r'"([a-z]+(?:_[a-z]+)+|duplicate|empty|markup)"', text)}
    kinds = {"conversation", "detailed_description", "complex_reasoning"}
    table = PAGE[PAGE.index("## The gate") :]
    told = set(re.findall(r"`([a-z_]+)`", table))
    assert said - kinds == told
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE[PAGE.index("## Teachers") :], flags=re.MULTILINE)) >= set(TEACHERS)
