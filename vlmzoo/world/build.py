"""Training of the base models from a seed, with their measured quality and the hash of every file."""

import json
import os
import shutil
from pathlib import Path

from torch import nn
from transformers import CLIPVisionModel

from vlmzoo.world import MODELS, VERSION, sha256
from vlmzoo.world.encoder import image_processor, retrieval, train_encoder
from vlmzoo.world.language import answer_accuracy, train_language_model

NUM_STEPS = {"clip": 1200, "llama": 2800}
NUM_QUESTIONS = 400  # a capability
NUM_GROUPS = 16  # of 64 captions


def build(only: str | None, out: Path, *, seed: int = 0, num_steps: int | None = None) -> list[Path]:
    """The directories of the trained models, `out/NAME`; one that stands is left, an interrupted one is continued.

    Args:
        only: one of MODELS, or None for all of them.
        num_steps: instead of each model's own number.

    Raises:
        ValueError: no model has this name, or `out` holds a model or checkpoint of another recipe.
    """
    if only is not None and only not in MODELS:
        raise ValueError(f"unknown world model {only!r}, expected one of {', '.join(MODELS)}")
    return [_build(name, out, seed, num_steps or NUM_STEPS[name]) for name in MODELS if only in (None, name)]


def _build(name: str, out: Path, seed: int, num_steps: int) -> Path:
    recipe: dict[str, object] = {"model": name, "version": VERSION, "seed": seed, "steps": num_steps}
    target, checkpoint = out / name, out / f"{name}.checkpoint"
    if target.exists():
        found = json.loads((target / "manifest.json").read_text())["recipe"]
        if found != recipe:
            raise ValueError(f"{target} was built with {found}, expected {recipe}: remove it or name another folder")
        return target
    aside = out / f"{name}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    write = _write_encoder if name == "clip" else _write_language_model
    quality = write(aside, checkpoint, num_steps, seed, recipe)
    (aside / "quality.json").write_text(json.dumps(recipe | quality, indent=1) + "\n")
    hashes = {file.name: sha256(file) for file in sorted(aside.iterdir())}
    (aside / "manifest.json").write_text(json.dumps({"recipe": recipe, "sha256": hashes}, indent=1) + "\n")
    os.replace(aside, target)
    shutil.rmtree(checkpoint)
    return target


def _write_encoder(
    aside: Path, checkpoint: Path, num_steps: int, seed: int, recipe: dict[str, object]
) -> dict[str, object]:
    reader, seconds = train_encoder(checkpoint, num_steps, seed, recipe)
    vision = CLIPVisionModel(reader.clip.vision_model.config)
    vision.load_state_dict(reader.clip.vision_model.state_dict())
    vision.save_pretrained(aside)
    image_processor().save_pretrained(aside)
    score = retrieval(reader, NUM_GROUPS, seed)
    return {"retrieval_of_64": round(score, 4), "seconds": round(seconds), "parameters": num_parameters(vision)}


def _write_language_model(
    aside: Path, checkpoint: Path, num_steps: int, seed: int, recipe: dict[str, object]
) -> dict[str, object]:
    model, tokenizer, seconds = train_language_model(checkpoint, num_steps, seed, recipe)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    scores = answer_accuracy(model, tokenizer, NUM_QUESTIONS, seed)
    accuracy = {capability: round(score, 4) for capability, score in scores.items()}
    return {"accuracy": accuracy, "seconds": round(seconds), "parameters": num_parameters(model)}


def num_parameters(model: nn.Module) -> int:
    """How many numbers the model holds."""
    return sum(parameter.numel() for parameter in model.parameters())
