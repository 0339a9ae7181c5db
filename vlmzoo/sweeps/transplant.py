"""Another connector between the encoder and the LLM of a model that exists already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from vlmzoo import build
from vlmzoo.config import ConnectorConfig, EncoderConfig, LLMConfig
from vlmzoo.files import damage, locked, whole_folder, write_whole
from vlmzoo.interop import beside, load

ORIGIN = "transplant.json"
ALIGN: dict[str, Any] = {"lr": {"connector": 1e-3}, "batch_size": 256, "epochs": 1}
"""LLaVA-1.5's first stage."""


def transplant(
    source: str,
    connector: str,
    data: Path,
    out: Path,
    *,
    images: Path | None = None,
    base: str | None = None,
    encoder: str | None = None,
) -> Path:
    """Writes a model's encoder and LLM below `out`, and a run that aligns a new connector between them.

    Args:
        source: a checkpoint that `vlmzoo.load` reads.
        data, images: LLaVA JSON of captions and the folder of its images.
        base, encoder: for LLaVA's own checkpoints, see `load`.

    Returns:
        The run's YAML; `vlmzoo train` takes it too. What is there already is not written again.

    Raises:
        ValueError: what `load` refuses, an unknown connector, or no tokenizer or image processor beside the weights.
    """
    build.connector_options(ConnectorConfig(connector))  # refused before anything large is read
    file, tower, llm = out / "transplant.yaml", out / "encoder", out / "llm"
    asked = {"source": source, "base": base, "encoder": encoder}
    with locked(out):
        if damage(tower) or damage(llm) or _origin(tower)["asked"] != asked:
            model = load(source, base=base, encoder=encoder)
            words, pictures = beside(source, base=base, encoder=encoder)
            tokenizer = build.tokenizer(LLMConfig(name=words), model.text_spec.vocab_size)
            image_processor = build.image_processor(EncoderConfig(name=pictures))
            model.language.config.bidirectional = model.config.bidirectional
            with build.quiet_transformers():
                with whole_folder(llm) as place:
                    model.language.save_pretrained(place)
                    tokenizer.save_pretrained(place)
                with whole_folder(tower) as place:
                    model.vision.model.save_pretrained(place)
                    image_processor.save_pretrained(place)
                    settings = {"layer": model.vision.layer, "image_size": model.vision.image_size}
                    (place / ORIGIN).write_text(json.dumps({"asked": asked, "encoder": settings}))
    run = {
        "encoder": {"name": str(tower), **_origin(tower)["encoder"]},
        "connector": connector,
        "llm": str(llm),
        "stages": {
            "align": {
                "data": {
                    "path": str(data),
                    "images": None if images is None else str(images),
                    "template": "plain",
                    "image_mode": "square",
                },
                **ALIGN,
            }
        },
    }
    write_whole(file, yaml.safe_dump(run, sort_keys=False))
    return file


def _origin(tower: Path) -> dict[str, Any]:
    """What was asked for when an encoder was written, and how it is read."""
    return json.loads((tower / ORIGIN).read_text(encoding="utf-8"))
