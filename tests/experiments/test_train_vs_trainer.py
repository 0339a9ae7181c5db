"""Losses against a trainer that is not ours, and what the benchmark writes down."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_losses_are_those_of_transformers_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "experiments" / "benchmarks")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the processes that it starts
    import train_vs_trainer

    options = ["--tiny", "--rounds", "2", "--accumulation", "2", "--threads", "1", "--arms", "stage2", "--no-nanovlm"]
    monkeypatch.setattr(sys, "argv", ["train_vs_trainer.py", *options, "--json", str(tmp_path / "found.json")])
    train_vs_trainer.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["memory"] > 0
    row = found["stage2"]
    assert row.keys() >= {"ratio", "flops_ratio", "seconds_ours", "seconds_peer", "memory", "outside_model"}
    assert row["loss_difference"] <= 1e-4
