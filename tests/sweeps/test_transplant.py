"""A trained model's encoder and LLM with another connector, in one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import vlmzoo
from tests.checkpoints import write_data, write_llava, write_models
from vlmzoo.cli import main
from vlmzoo.model import VisionLanguageModel
from vlmzoo.processor import VisionLanguageProcessor

OPTIONS = ["connector.options.num_queries=4", "connector.options.num_layers=2", "connector.options.hidden_size=16"]
SHORT = [*OPTIONS, "connector.options.num_heads=2", "stages.align.batch_size=4"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A LLaVA as transformers saves it, with its tokenizer and image processor, and captions beside it."""
    write_data(tmp_path)
    return write_llava(write_models(tmp_path / "models"))


def command(source: Path, connector: str = "qformer") -> list[str]:
    folder = source.parents[1]
    data, out = str(folder / "captions.json"), str(folder / "out")
    return ["transplant", str(source), "--connector", connector, "--data", data, "--out", out]


def test_encoder_and_llm_stay_and_the_new_connector_learns(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*command(source), *SHORT, "stages.align.epochs=2"]) == 0
    out = source.parents[1] / "out"
    assert f"{out / 'model'}: qformer" in capsys.readouterr().out
    before, after = vlmzoo.load(source), VisionLanguageModel.from_pretrained(out / "model")
    for part in ("vision", "language"):
        old, new = getattr(before, part).state_dict(), getattr(after, part).state_dict()
        assert old.keys() == new.keys()
        assert all(torch.equal(new[name], value) for name, value in old.items())
    assert after.config.connector == "qformer"
    assert after.config.image_token_id == before.config.image_token_id
    assert VisionLanguageProcessor.from_pretrained(out / "model").layouts.image_size == 24
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 16
    assert sum(losses[-4:]) < sum(losses[:4])
    run = yaml.safe_load((out / "transplant.yaml").read_text())
    assert run["encoder"]["layer"] == -2
    assert run["stages"]["align"]["batch_size"] == 256

    monkeypatch.setattr("vlmzoo.sweeps.transplant.load", None)  # once more computes and writes nothing
    assert main([*command(source), *SHORT, "stages.align.epochs=2"]) == 0


def test_llavas_own_projector(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the LLM that it was trained on; its encoder it names itself."""
    models, folder = source.parent, source.parent / "original"
    folder.mkdir()
    own = json.loads((models / "llama" / "config.json").read_text())
    settings = {"model_type": "llava_llama", "mm_projector_type": "linear", "mm_vision_tower": str(models / "clip")}
    (folder / "config.json").write_text(json.dumps({**own, **settings}))
    projector = {"model.mm_projector.weight": torch.ones(48, 32), "model.mm_projector.bias": torch.ones(48)}
    torch.save(projector, folder / "mm_projector.bin")
    assert main([*command(folder, "linear"), "stages.align.steps=1", "stages.align.epochs=null"]) == 2
    assert "pass the one that it was trained on as `base`" in capsys.readouterr().err
    options = ["stages.align.steps=1", "stages.align.epochs=null", "--base", str(models / "llama")]
    assert main([*command(folder, "linear"), *options]) == 0
    after = VisionLanguageModel.from_pretrained(source.parents[1] / "out" / "model")
    assert not torch.equal(after.connector.state_dict()["inner.project.bias"], torch.ones(48)), "a new one"


def test_mistakes_are_one_line(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(source, "qformr")) == 2
    assert "did you mean 'qformer'?" in capsys.readouterr().err
    assert not (source.parents[1] / "out").exists()
    (source / "preprocessor_config.json").unlink()
    assert main(command(source)) == 2
    assert "image processor" in capsys.readouterr().err
    (source / "model.safetensors").unlink()
    assert main(command(source)) == 2
    assert capsys.readouterr().err.count("\n") == 1
