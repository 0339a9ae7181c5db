"""docs/kernels.md: its code runs, its tables are those of the committed benchmark, and it names every backend."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vlmzoo.kernels import bench
from vlmzoo.kernels.attention import BACKENDS

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/kernels.md").read_text()


def test_its_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert capsys.readouterr().out.startswith("chunked: ")
    assert names["read"].shape == names["q"].shape
    assert names["answer"].shape == names["text"].shape
    assert not names["answer"][:, :25].any()
    assert names["loss"].isfinite()


def test_its_figures_are_the_committed_ones() -> None:
    result = json.loads((ROOT / "experiments/results/kernels/cpu.json").read_text())
    assert f"<!-- bench -->\n```\n{bench.table(result)}\n```\n<!-- end -->" in GUIDE


def test_it_names_every_backend() -> None:
    assert all(f"`{name}`" in GUIDE for name in BACKENDS)
