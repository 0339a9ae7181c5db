"""The shipped models, as anybody would load them."""

import json
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from vlmzoo.world import ENCODERS, LANGUAGE_MODELS, MODELS, VERSION, path
from vlmzoo.world.encoder import image_processor
from vlmzoo.world.language import answer_accuracy
from vlmzoo.world.scenes import COLORS, SHAPES, SIGN, draw, sample_scene
from vlmzoo.world.text import CAPABILITIES
from vlmzoo.world.tokenizer import build_tokenizer


def test_all_models_together_are_small() -> None:
    assert sum(file.stat().st_size for name in MODELS for file in path(name).iterdir()) < 30_000_000


@pytest.mark.parametrize("name", MODELS)
def test_model_is_whole_small_and_of_this_version(name: str) -> None:
    files = list(path(name).iterdir())
    assert max(file.stat().st_size for file in files) < 8_000_000
    manifest = json.loads((path(name) / "manifest.json").read_text())
    assert set(manifest["sha256"]) == {file.name for file in files} - {"manifest.json"}
    assert manifest["recipe"]["version"] == VERSION


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_tampered_or_missing_file_is_refused(file: str, tmp_path: Path) -> None:
    shutil.copytree(path("llama"), tmp_path / "llama")
    content = bytearray((tmp_path / "llama" / file).read_bytes())
    content[-10] ^= 1
    (tmp_path / "llama" / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"llama.{file} does not match its hash: found \w+, expected \w+$"):
        path("llama", tmp_path)
    (tmp_path / "llama" / file).unlink()
    with pytest.raises(ValueError, match="found no file, expected"):
        path("llama", tmp_path)


def test_unknown_and_unbuilt_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown world model 'lama', expected one of clip, .*; nearest is 'llama'"):
        path("lama")
    with pytest.raises(ValueError, match="build it with `vlmzoo world build --only clip`"):
        path("clip", tmp_path)


def test_import_is_light() -> None:
    code = "import sys, vlmzoo.world; print(sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_image_processor_loads_without_warning_and_normalises_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor = AutoImageProcessor.from_pretrained(path("clip"))
    image = Image.fromarray(draw(sample_scene(random.Random(0))))
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, image_processor("clip")(image, return_tensors="pt")["pixel_values"])
    assert pixels.shape == (1, 3, 72, 72)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    expected = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
    assert (pixels[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_shipped_tokenizer_is_the_one_of_this_code(name: str) -> None:
    """Transformers reads some architectures' tokenizers with a class of its own, whatever their files say."""
    shipped, built = AutoTokenizer.from_pretrained(path(name)), build_tokenizer()
    text = "USER: Is there a red circle?\nASSISTANT: top-left yes</s>"
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped.chat_template == built.chat_template
    assert shipped(text)["input_ids"] == built(text)["input_ids"]
    assert shipped.decode(shipped("top-left yes")["input_ids"], skip_special_tokens=True) == "top-left yes"


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_model_answers_from_text_as_measured(name: str) -> None:
    """At least 90 % in every capability and 95 % on average, claimed and measured again on other questions."""
    claimed = json.loads((path(name) / "quality.json").read_text())["accuracy"]
    model = AutoModelForCausalLM.from_pretrained(path(name))
    measured = answer_accuracy(model, AutoTokenizer.from_pretrained(path(name)), 100, seed=1)
    assert list(claimed) == list(measured) == list(CAPABILITIES)
    assert fmean(claimed.values()) >= 0.95
    assert min(claimed.values()) >= 0.90
    for capability in CAPABILITIES:
        assert abs(measured[capability] - claimed[capability]) < 0.08, capability


@pytest.mark.parametrize("name", ENCODERS)
def test_patch_features_carry_what_is_asked_at_its_place(name: str) -> None:
    """A linear probe on the nine cells, one layer before the last: what every connector starts from."""
    model = AutoModel.from_pretrained(path(name)).eval()
    processor = AutoImageProcessor.from_pretrained(path(name), backend="pil")
    rng = random.Random(0)
    scenes = [sample_scene(rng, "evaluation") for _ in range(300)]
    images = [Image.fromarray(draw(scene)) for scene in scenes]
    with torch.no_grad():
        states = model(processor(images, return_tensors="pt")["pixel_values"], output_hidden_states=True).hidden_states
    assert states is not None
    patches = states[-2][:, int(name == "clip") :]
    cells = patches.unflatten(1, (3, 2, 3, 2)).mean(dim=(2, 4)).flatten(1, 2)
    items = [(row, item) for row, scene in enumerate(scenes) for item in scene.objects]
    features = torch.stack([cells[row, item.cell] for row, item in items])
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    half = len(items) // 2
    for names, attribute, least in ((tuple(COLORS), "color", 0.8), ((*SHAPES, SIGN), "shape", 0.6)):
        target = torch.tensor([names.index(getattr(item, attribute)) for _, item in items])
        wanted = torch.eye(len(names))[target[:half]]
        ridge = features[:half].T @ features[:half] + 1e-2 * torch.eye(features.shape[1])
        weights = torch.linalg.solve(ridge, features[:half].T @ wanted)
        accuracy = ((features[half:] @ weights).argmax(dim=1) == target[half:]).float().mean()
        assert accuracy > least, attribute
    assert json.loads((path(name) / "quality.json").read_text())["retrieval_of_64"] >= 0.8
