"""The benchmark of a GPU, tried out on a CPU with tiny models: its losses, and what it says that a step needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vlmzoo.model import VisionLanguageModel
from vlmzoo.training import adapters, log

ROOT = Path(__file__).parents[2]


def test_every_arm_has_the_losses_of_transformers_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "experiments" / "benchmarks")
    monkeypatch.setattr(log.Log, "write", log.Log.write)  # given back at the end: the benchmark puts its own there
    import train_on_gpu

    compiled = train_on_gpu.ARMS.pop("stage2_packed_compiled")  # minutes of a compiler
    assert compiled.compiled
    options = ["--tiny", "--device", "cpu", "--rounds", "1", "--steps", "1", "--batch", "8", "--micro-batch", "4", "2"]
    assert train_on_gpu.main([*options, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "training.json").read_text())
    assert found["arms"].keys() == train_on_gpu.ARMS.keys()
    for name, row in found["arms"].items():
        assert row["losses"][0] > 1
        assert row["tokens_per_second"] > 0
        assert row["mfu"] > 0
        if not name.endswith("_transformers"):
            assert row["loss_difference"] < 3e-2
            assert row["ratio"] > 0
    assert found["arms"]["stage1"]["flops"] > found["arms"]["stage1_cached"]["flops"]
    assert found["arms"]["stage2_cached"]["flops"] == found["arms"]["stage2_packed"]["flops"]
    assert all(name in (tmp_path / "training.md").read_text() for name in found["arms"])


def test_what_is_needed_is_counted_by_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """7B's layers by hand: 4 d² of attention and 3 d i of the MLP each, thin matrices of rank 128 beside each."""
    monkeypatch.syspath_prepend(ROOT / "experiments" / "benchmarks")
    import train_on_gpu
    import train_vs_trainer

    options = train_on_gpu.parse(["--out", str(tmp_path)])
    options.folder, options.accumulation = tmp_path, 4
    train_vs_trainer.tokenizer(32000).save_pretrained(tmp_path / "tokenizer")
    run = train_on_gpu.configuration(options, train_on_gpu.ARMS["stage2"])
    with torch.device("meta"):
        model = VisionLanguageModel.of_run(run)
        adapters.enter(model.language, run.stages["stage2"], [], 0)
    dim, inner, layers, words = 4096, 11008, 32, 32000
    frozen = layers * (4 * dim**2 + 3 * dim * inner)
    thin = layers * 128 * (4 * 2 * dim + 3 * (dim + inner))
    encoder = 24 * 12 * 1024**2 + 577 * 1024  # and the positions, which are no matrix product; .2 %
    work = train_on_gpu.Work(tokens=700, targets=100, images=1)
    head, connector = 4 * 100 * dim * words, 576 * 6 * (1024 * dim + dim * dim)
    cached = 700 * (4 * frozen + 6 * thin) + head + connector
    assert work.flops(model, cached=True) == cached
    assert work.flops(model, cached=False) == cached + 576 * 2 * encoder


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "experiments" / "benchmarks")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    import train_on_gpu

    assert train_on_gpu.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "train_on_gpu: needs a CUDA device, and PyTorch sees none here\n"
