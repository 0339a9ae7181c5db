"""Training of the base models from a seed, with their measured quality and the hash of every file."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel, SiglipVisionModel

from vlmzoo.world import ENCODERS, MODELS, VERSION, sha256, unknown_model
from vlmzoo.world.encoder import image_processor, retrieval, train_encoder
from vlmzoo.world.language import answer_accuracy, train_language_model

NUM_STEPS = {"clip": 6_000, "siglip": 6_000, "llama": 12_000, "qwen": 12_000}
NUM_QUESTIONS = 400  # a capability
NUM_GROUPS = 16  # of 64 captions


def build(only: str | None, out: Path, *, seed: int = 0, num_steps: int | None = None) -> list[Path]:
    """The directories of the trained models, `out/NAME`; one that stands is left, an interrupted one is continued.

    Args:
        only: one of MODELS, or None for all of them.
        num_steps: instead of each model's own number.

    Raises:
        ValueError: no model has this name, or `out` holds a model or checkpoint of another recipe.
        OSError: the disk is full; the checkpoint before stands, and the same call continues from it.
    """
    if only is not None and only not in MODELS:
        raise unknown_model(only)
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
    write = _write_encoder if name in ENCODERS else _write_language_model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # sums are split among threads: weights must not depend on how many cores there are
    quality = write(name, aside, checkpoint, num_steps, seed, recipe, device)
    (aside / "quality.json").write_text(json.dumps(recipe | quality, indent=1) + "\n")
    hashes = {file.name: sha256(file) for file in sorted(aside.iterdir())}
    (aside / "manifest.json").write_text(json.dumps({"recipe": recipe, "sha256": hashes}, indent=1) + "\n")
    os.replace(aside, target)
    shutil.rmtree(checkpoint)
    return target


def _write_encoder(
    name: str, aside: Path, checkpoint: Path, num_steps: int, seed: int, recipe: dict[str, object], device: str
) -> dict[str, object]:
    reader, seconds = train_encoder(name, checkpoint, num_steps, seed, recipe, device)
    tower: Any = reader.model.vision_model
    vision = (CLIPVisionModel if name == "clip" else SiglipVisionModel)(tower.config)
    vision.load_state_dict(tower.state_dict())
    vision.save_pretrained(aside)
    image_processor(name).save_pretrained(aside)
    score = retrieval(reader, NUM_GROUPS, seed)
    return {"retrieval_of_64": round(score, 4), "seconds": round(seconds), "parameters": num_parameters(vision)}


def _write_language_model(
    name: str, aside: Path, checkpoint: Path, num_steps: int, seed: int, recipe: dict[str, object], device: str
) -> dict[str, object]:
    model, tokenizer, seconds = train_language_model(name, checkpoint, num_steps, seed, recipe, device)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    scores = answer_accuracy(model, tokenizer, NUM_QUESTIONS, seed)
    accuracy = {capability: round(score, 4) for capability, score in scores.items()}
    return {"accuracy": accuracy, "seconds": round(seconds), "parameters": num_parameters(model)}


def num_parameters(model: nn.Module) -> int:
    """How many numbers the model holds."""
    return sum(parameter.numel() for parameter in model.parameters())
