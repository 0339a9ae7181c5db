"""Everything the README shows is run, in its order, in a folder where somebody has a clone and files of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write_data, write_llava, write_models
from vlmzoo.sweeps.table import render

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
NOT_RUN = {"make sweep", "make test", "source .venv/bin/activate"}  # quick.yaml stands for the sweep; this is the test


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone as the README's commands find it, and checkpoints and data as its user has them."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    write_llava(write_models(folder / "checkpoints"))
    data = write_data(folder / "data")
    for name in ("train", "questions"):
        shutil.copy(data, folder / "data" / f"{name}.json")
    return folder


@pytest.fixture(scope="module")
def environment(folder: Path) -> dict[str, str]:
    """With `vlmzoo` as a command of this checkout, and no cache of an earlier run."""
    command = folder / "bin" / "vlmzoo"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vlmzoo "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(command.parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "VLMZOO_CACHE": str(folder / "cache")}


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_two_make_commands_come_first() -> None:
    assert BLOCKS[0] == ("bash", "make sweep\nmake test\n")


def test_every_block_runs(folder: Path, environment: dict[str, str]) -> None:
    printed: dict[str, str] = {}
    for language, text in BLOCKS:
        named = re.match(r"# (\S+\.\w+)\n", text)
        if named:
            (folder / named[1]).write_text(text)
        elif language == "python":
            printed[text] = run([sys.executable, "-c", text], folder, environment)
            assert printed[text].strip()
        elif language == "bash":
            for line in text.splitlines():
                if line not in NOT_RUN:
                    printed[line] = run(["bash", "-c", line], folder, environment)
    (evaluated,) = (output for line, output in printed.items() if line.startswith("vlmzoo eval"))
    result = json.loads((folder / "runs" / "quick" / "result.json").read_text())
    assert json.loads(evaluated)["tasks"] == result["evaluation"]
    assert json.loads((folder / "exported" / "config.json").read_text())["model_type"] == "llava"
    assert json.loads((folder / "runs" / "transplant" / "result.json").read_text())["connector"] == "average_pool"
    assert len(json.loads((folder / "runs" / "mine" / "summary.json").read_text())["rows"]) == 2
    assert "strided" in printed[next(line for line in printed if "--dry-run" in line)]


def test_the_tables_are_the_committed_ones() -> None:
    quoted = re.findall(r"^<!-- table: (\S+) -->\n```\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    assert len(quoted) == 2
    for path, table in quoted:
        assert table.strip() == render(json.loads((ROOT / path).read_text())).strip()


def test_the_tree_names_what_is_there() -> None:
    tree = README[README.index("## What is where") :]
    for line in tree.splitlines():
        found = re.match(r"(  )?(\S+?)/?\s{2,}", line)
        if found:
            assert (ROOT / ("vlmzoo" if found[1] else "") / found[2]).exists(), line
