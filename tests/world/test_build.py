import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel, SiglipVisionModel

from vlmzoo.world import ENCODERS, LANGUAGE_MODELS, MODELS, encoder, fitting, language, path
from vlmzoo.world import build as build_module
from vlmzoo.world.build import build
from vlmzoo.world.fitting import fit
from vlmzoo.world.scenes import sample_scene
from vlmzoo.world.tokenizer import build_tokenizer


class StopError(Exception):
    pass


def train(directory: Path, stop: int | None = None, steps: int = 8, seed: int = 0) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)

    def loss_at(step: int) -> Tensor:
        if step == stop:
            raise StopError
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return model(batch).square().sum()

    fit(model, loss_at, num_steps=steps, peak=0.1, recipe={"seed": seed}, directory=directory)
    return model


@pytest.fixture(autouse=True)
def checkpoint_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", -1)


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_interrupted_training_continues_to_the_same_weights(stop: int, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(StopError):
        train(tmp_path / "parts", stop)
    assert json.loads((tmp_path / "parts" / "state.json").read_text())["step"] == stop
    continued = train(tmp_path / "parts")
    assert torch.equal(whole.weight, continued.weight)


def test_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(StopError):
        train(tmp_path / "parts", stop=5)
    (tmp_path / "parts").rename(tmp_path / "parts.before")
    with pytest.raises(StopError):
        train(tmp_path / "parts", stop=5)  # reached at once: nothing was trained again
    assert torch.equal(whole.weight, train(tmp_path / "parts").weight)


def test_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "model")
    with pytest.raises(ValueError, match=r"has recipe {'seed': 0}, expected {'seed': 1}"):
        train(tmp_path / "model", seed=1)


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail at inline_container.cc] . write failed"), OSError(28, "")]
)
def test_a_full_disk_stops_it_and_loses_nothing(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole")
    saved, save = [], torch.save

    def full(*arguments: object) -> None:
        if len(saved) == 3:
            raise error
        saved.append(arguments)
        save(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match="cannot be written" if isinstance(error, RuntimeError) else None):
            train(tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "state.json").read_text())["step"] == 3
    assert not (tmp_path / "parts.writing").exists()
    assert torch.equal(whole.weight, train(tmp_path / "parts").weight)


def test_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    before = model.weight.clone()
    with pytest.raises(FloatingPointError, match="at step 0 of model"):
        fit(
            model,
            lambda step: model(torch.ones(1, 1)).sum() * float("nan"),
            num_steps=1,
            peak=1.0,
            recipe={},
            directory=tmp_path / "model",
        )
    assert torch.equal(model.weight, before)


def test_build_writes_what_transformers_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "NUM_QUESTIONS", 2)
    monkeypatch.setattr(build_module, "NUM_GROUPS", 1)
    monkeypatch.setattr(language, "BATCH", 2)
    monkeypatch.setattr(encoder, "BATCH", 4)
    assert build(None, tmp_path, num_steps=1) == [tmp_path / name for name in MODELS]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(MODELS)
    assert path("clip", tmp_path) == tmp_path / "clip"
    assert CLIPVisionModel.from_pretrained(tmp_path / "clip").config.image_size == 72
    assert SiglipVisionModel.from_pretrained(tmp_path / "siglip").config.patch_size == 12
    for name, model_type in zip(LANGUAGE_MODELS, ("llama", "qwen3"), strict=True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert model.config.model_type == model_type
        assert model.config.vocab_size == len(tokenizer)
        assert tokenizer.chat_template == build_tokenizer().chat_template
        assert json.loads((tmp_path / name / "quality.json").read_text())["steps"] == 1

    written = load_file(tmp_path / "clip" / "model.safetensors")
    build("clip", tmp_path, num_steps=1)  # stands already
    build("clip", tmp_path / "again", num_steps=1)
    again = load_file(tmp_path / "again" / "clip" / "model.safetensors")
    assert all(torch.equal(written[name], again[name]) for name in written)
    with pytest.raises(ValueError, match=r"was built with .*'steps': 1}, expected .*'steps': 2}"):
        build("clip", tmp_path, num_steps=2)


def test_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown world model 'sigclip', expected .*; nearest is 'siglip'"):
        build("sigclip", tmp_path)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_loss_sees_the_altered_twin(name: str) -> None:
    """A twin that cannot be told apart costs more than captions of other scenes."""
    torch.manual_seed(0)
    reader = encoder.Reader(name, build_tokenizer()).eval()
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(4)]
    other = [sample_scene(rng) for _ in range(4)]
    with torch.no_grad():
        reader.model.logit_scale.fill_(4.0)
        assert encoder.contrastive_loss(reader, scenes, scenes) > encoder.contrastive_loss(reader, scenes, other)
