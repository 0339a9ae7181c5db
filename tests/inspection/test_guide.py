"""docs/data-check.md: its commands run and print what it shows, and it names every kind of finding."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.inspection.conftest import FOUND
from vlmzoo.cli import main

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/data-check.md").read_text(encoding="utf-8")
SHOWN = r"<!-- output -->\n```\n(.*?)\n```\n<!-- end -->"
FAULTY = {"train.json"}  # of the data that it checks


def test_its_commands_run_and_print_what_it_shows(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data.parent)
    (data.parent / "experiments").symlink_to(ROOT / "experiments")
    printed: list[str] = []
    for block in re.findall(r"^```bash\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "vlmzoo"
            assert main(arguments) == (1 if arguments[:2] == ["data", "check"] and arguments[2] in FAULTY else 0), line
            printed.append(capsys.readouterr().out.replace(str(data.parent), "/data").strip())
    shown = re.findall(SHOWN, GUIDE, flags=re.DOTALL)
    assert shown == [text for text in printed if text in shown]
    assert len(shown) == 2


def test_it_names_every_kind() -> None:
    assert all(f"`{kind}`" in GUIDE for _, kind in FOUND)
