"""Checkpoints: whole or not there, verified, and never mistaken for another run's."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import Trained, metrics
from vlmzoo.training import checkpoint
from vlmzoo.training import run as loop

Train = Callable[..., Trained]


@pytest.fixture
def trained(values: dict[str, Any], tmp_path: Path, train_in: Train) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run that has ended, with its last two checkpoints, and its weights."""
    weights, _ = train_in(values, tmp_path / "out")
    return tmp_path / "out", weights


def test_the_last_two_are_kept(trained: tuple[Path, Any]) -> None:
    assert sorted(place.name for place in (trained[0] / "checkpoints").iterdir()) == ["00000007", "00000008"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("00000008", "model.safetensors"),
        ("00000008", "state.json"),
        ("00000008", "sha256.json"),
        ("00000007", "optimizer.pt"),
        ("00000007", "model.safetensors"),
    ],
)
@pytest.mark.parametrize("harm", [flip, halve, Path.unlink])
def test_a_damaged_one_is_passed_over(
    place: str,
    name: str,
    harm: Callable[[Path], None],
    trained: tuple[Path, dict[str, torch.Tensor]],
    values: dict[str, Any],
    train_in: Train,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, expected = trained
    before = metrics(out)
    if place == "00000007":  # within a stage; without the last one it would be the next to go on from
        shutil.rmtree(out / "checkpoints" / "00000008")
    harm(out / "checkpoints" / place / name)
    found, _ = train_in(values, out)
    assert "checkpoint passed over: " in capsys.readouterr().err
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert metrics(out) == before


def test_of_another_configuration_it_is_refused(
    trained: tuple[Path, Any], values: dict[str, Any], train_in: Train
) -> None:
    with pytest.raises(ValueError, match=r"00000008: is of another configuration; choose another --out"):
        train_in({**values, "checkpoint_every": 4}, trained[0])


def test_a_full_disk_leaves_the_one_before(
    values: dict[str, Any], tmp_path: Path, train_in: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = checkpoint.save_file, []

    def full(tensors: Any, file: Path) -> None:
        saved.append(file)
        save(tensors, file)
        if len(saved) == 2:
            halve(file)
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            train_in(values, tmp_path)
    assert caught.value.filename == str(tmp_path / "checkpoints" / "00000004")
    assert [place.name for place in (tmp_path / "checkpoints").iterdir()] == ["00000003"]
    found, _ = train_in(values, tmp_path)
    expected, _ = train_in(values, tmp_path / "straight")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_metrics_are_cut_back_to_the_checkpoint(
    trained: tuple[Path, Any], values: dict[str, Any], train_in: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = trained
    before = metrics(out)
    shutil.rmtree(out / "checkpoints" / "00000008")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "finetune", "ste')  # the line that a killed process was writing
    taken: list[None] = []
    take_step = loop.take_step
    monkeypatch.setattr(loop, "take_step", lambda *arguments: taken.append(None) or take_step(*arguments))
    train_in(values, out)
    assert metrics(out) == before
    assert len(taken) == 1
