"""The embedded world: scenes drawn from a seed, what is said about them, and base models that have learnt it."""

import difflib
import hashlib
import json
from pathlib import Path

VERSION = 2  # raised with every change that alters scenes, texts or pixels: old files are then never used again
ENCODERS = ("clip", "siglip")
LANGUAGE_MODELS = ("llama", "qwen")
MODELS = (*ENCODERS, *LANGUAGE_MODELS)
DATASETS = {
    "captions": 12_000,
    "conversations": 12_000,
    "questions": 1_400,
    "validation": 720,
}  # name: default number of records

_SHIPPED = Path(__file__).parent / "models"


def path(name: str, directory: Path = _SHIPPED) -> Path:
    """The directory of a shipped base model, after its files were compared with their hashes.

    Raises:
        ValueError: no model has this name, or a file is missing or not the one that was shipped.
    """
    if name not in MODELS:
        raise unknown_model(name)
    model = directory / name
    manifest = model / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"world model {name!r} has no {manifest}: build it with `vlmzoo world build --only {name}`")
    for file, digest in json.loads(manifest.read_text())["sha256"].items():
        found = sha256(model / file) if (model / file).is_file() else "no file"
        if found != digest:
            raise ValueError(f"{model / file} does not match its hash: found {found[:12]}, expected {digest[:12]}")
    return model


def unknown_model(name: str) -> ValueError:
    """The error for a name that no world model has."""
    nearest = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)[0]
    return ValueError(f"unknown world model {name!r}, expected one of {', '.join(MODELS)}; nearest is {nearest!r}")


def sha256(file: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
