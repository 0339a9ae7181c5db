"""Hub ids, read as transformers reads them: from the hub's cache where they have been fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoints import run_values, tokenizer, write_data, write_models
from vlmzoo import build
from vlmzoo.cli import main
from vlmzoo.config import LLMConfig

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny checkpoints as `someone/clip`, `someone/llama` … in the hub's cache, and no way to the hub itself."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for model in write_models(tmp_path / "models").iterdir():
        entry = tmp_path / "hub" / f"models--someone--{model.name}"
        (entry / "refs").mkdir(parents=True)
        (entry / "refs" / "main").write_text(REVISION)
        (entry / "snapshots").mkdir()
        (entry / "snapshots" / REVISION).symlink_to(model)
    return tmp_path


def scores(folder: Path, encoder: str, llm: str) -> dict:
    values = run_values(folder)
    out = folder / encoder.replace("/", "-")
    (folder / "run.yaml").write_text(json.dumps({**values, "encoder": encoder, "llm": llm}))
    assert main(["train", str(folder / "run.yaml"), "--out", str(out)]) == 0
    return json.loads((out / "result.json").read_text())["evaluation"]


def test_an_id_is_as_good_as_its_directory(cached: Path) -> None:
    write_data(cached)
    models = cached / "models"
    expected = scores(cached, str(models / "siglip"), str(models / "qwen"))
    assert scores(cached, "someone/siglip", "someone/qwen") == expected


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [
        ("someone/klip", "encoder someone/klip: no directory here, and the hub gave nothing"),
        ("someone/clip", "encoder someone/clip: cannot be loaded"),
    ],
)
def test_what_is_nowhere_and_what_is_broken_differ(
    encoder: str, expected: str, cached: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(cached)
    (cached / "models" / "clip" / "model.safetensors").write_bytes(b"broken")
    (cached / "run.yaml").write_text(json.dumps({**run_values(cached), "encoder": encoder}))
    assert main(["train", str(cached / "run.yaml"), "--out", str(cached / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vlmzoo: error: {expected} (")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_tokenizer_is_what_its_file_says_beside_any_model(model_type: str, tmp_path: Path) -> None:
    """transformers 5.23 gives some model types a tokenizer of its own making; ours are whole words."""
    folder = write_models(tmp_path) / "llama"
    text = "USER: What color is it? ASSISTANT: red"
    expected = tokenizer()(text)["input_ids"]
    assert len(set(expected)) == 9
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": model_type}))
    assert build.tokenizer(LLMConfig(str(folder)))(text)["input_ids"] == expected
