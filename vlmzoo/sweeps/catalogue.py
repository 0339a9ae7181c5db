"""What can be named in a YAML, for `vlmzoo list`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from vlmzoo.sweeps.table import align, count

ENCODERS = ("clip", "siglip")
ANY_OTHER = {
    "encoders": "any CLIP, SigLIP, SigLIP 2, DINOv2 or InternViT tower in transformers format; several joined by +",
    "llms": "any causal language model of transformers, with its tokenizer",
    "datasets": "LLaVA JSON and its images",
    "tasks": "LLaVA JSON of questions with one answer each, and a `capability` where there are several",
}


def entries(kind: str, plugins: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """The names of a kind (connectors, encoders, llms, tasks, datasets), each with a line that says what it is."""
    if kind == "connectors":
        return _connectors(plugins)
    if kind == "tasks":
        own = [
            {"name": "world:questions", "summary": "held-out questions about the embedded world, by capability"},
            {"name": "world:validation", "summary": "others, to choose learning rates by"},
        ]
        return [*own, {"name": "FILE.json", "summary": ANY_OTHER[kind]}]
    if kind == "datasets":
        return _datasets()
    return [*_world_models(kind), {"name": "HUB_ID or DIRECTORY", "summary": ANY_OTHER[kind]}]


def _datasets() -> list[dict[str, Any]]:
    from vlmzoo import world
    from vlmzoo.data.published import recipes

    own = [
        {"name": f"world:{name}", "summary": f"{number:,} records of the embedded world, drawn at first use"}
        for name, number in world.DATASETS.items()
    ]
    published = []
    for name in recipes.names():
        found = recipes.recipe(name)
        number = f"{found.records:,} records: " if found.records is not None else ""
        published.append({"name": name, "summary": f"{number}{found.summary}; by `vlmzoo data fetch {name}`"})
    return [*own, *published, {"name": "FILE.json", "summary": ANY_OTHER["datasets"]}]


def costs(names: Sequence[str], vision_dim: int, text_dim: int) -> dict[str, dict[str, Any]]:
    """Name -> the figures of its cost; of one that refuses these widths, why."""
    from vlmzoo.sweeps.costs import cost

    found: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            found[name] = asdict(cost(name, vision_dim, text_dim))
        except ValueError as error:
            found[name] = {"refused": str(error)}
    return found


def cost_table(costs: Mapping[str, Mapping[str, Any]]) -> str:
    """The costs aligned, for a terminal."""
    from vlmzoo.sweeps.costs import GRID, TEXT_LENGTH

    header = ["connector", "tokens", "parameters", "FLOPs", "weights", "activations"]
    counted = {name: found for name, found in costs.items() if "refused" not in found}
    rows = [
        [
            name,
            str(found["tokens"]),
            count(found["parameters"]),
            count(found["flops"]),
            f"{found['weight_bytes'] / 2**20:,.0f} MiB",
            f"{found['activation_bytes'] / 2**20:,.1f} MiB",
        ]
        for name, found in counted.items()
    ]
    notes = [
        f"one image of {GRID[0]} x {GRID[1]} patches and {TEXT_LENGTH} tokens of text, in bfloat16, with the defaults;",
        "layers inside the LLM included; FLOPs of a forward pass, activations kept for the backward pass",
    ]
    refused = [f"{name}: {found['refused']}" for name, found in costs.items() if "refused" in found]
    return "\n".join([align(header, rows, num_left=1), *notes, *refused])


def _connectors(plugins: Sequence[Path]) -> list[dict[str, Any]]:
    from vlmzoo.build import load_connectors
    from vlmzoo.connector import connectors

    load_connectors(plugins)
    return [
        {
            "name": name,
            "summary": (inspect.getdoc(connectors.get(name)) or "").partition("\n")[0],
            "options": {
                option: None if parameter.default is parameter.empty else parameter.default
                for option, parameter in connectors.options(name).items()
            },
        }
        for name in connectors.names()
    ]


def _quality(quality: dict[str, Any]) -> str:
    """What was measured when it was built."""
    if "accuracy" in quality:
        scores = quality["accuracy"].values()
        weakest = f"{100 * min(scores):.1f} % in its weakest capability"
        return f"told what is there it answers {100 * fmean(scores):.1f} % right, {weakest}"
    return f"finds the right caption of 64 in {100 * quality['retrieval_of_64']:.1f} %"


def _world_models(kind: str) -> list[dict[str, Any]]:
    found = []
    models = resources.files("vlmzoo.world") / "models"
    for folder in sorted(models.iterdir(), key=lambda folder: folder.name) if models.is_dir() else []:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family = config["model_type"].removesuffix("_vision_model")
        if (family in ENCODERS) == (kind == "encoders"):
            quality = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
            summary = f"a small {family} trained on the embedded world: {_quality(quality)}"
            found.append({"name": f"world:{folder.name}", "summary": summary})
    return found
