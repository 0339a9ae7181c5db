"""What a run's stages ask for, refused before any weights load where it cannot be had."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import nn

from vlmzoo import build
from vlmzoo.config import LoRAConfig, Part, RunConfig, StageConfig
from vlmzoo.training import adapters
from vlmzoo.training.stages import check_patterns
from vlmzoo.vision.encoder import VisionEncoder


def check(run: RunConfig) -> None:
    """Refuses stages that contradict themselves or those before them, and patterns that match nothing.

    Raises:
        ValueError: with the place in the configuration.
    """
    stages = list(run.stages.values())
    for index, (name, stage) in enumerate(run.stages.items()):
        try:
            for part in stage.only or {}:
                _check_only(stage, part)
            if stage.lora is not None:
                _check_lora(run, stage, stage.lora, stages[:index])
            for part in stage.only or {}:
                check_patterns(_without_weights(run, part), part, stage)
            if stage.lora is not None:
                adapters.targets(_without_weights(run, "language"), stage.lora)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise ValueError(f"stages.{name}.{error}") from None


def _check_only(stage: StageConfig, part: Part) -> None:
    if part not in stage.lr:
        raise ValueError(f"only.{part}: {part!r} has no learning rate, expected one of {', '.join(stage.lr)}")
    if not (stage.only or {})[part]:
        raise ValueError(f"only.{part}: expected at least one pattern; leave {part!r} out of lr to freeze it")
    if part == "language" and stage.lora is not None:
        raise ValueError("only.language: names the LLM's own weights, which lora freezes; name layers in lora.targets")


def _check_lora(run: RunConfig, stage: StageConfig, lora: LoRAConfig, earlier: Sequence[StageConfig]) -> None:
    if "language" not in stage.lr:
        raise ValueError(f"lora: needs a learning rate for 'language', got those of {', '.join(stage.lr)}")
    if not lora.targets:
        raise ValueError("lora.targets: expected at least one pattern, or all-linear")
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora: needs peft, got none; pip install 'vlmzoo[lora]'")
    if lora.quantize is None:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"lora.quantize: {lora.quantize} needs bitsandbytes, got none; pip install 'vlmzoo[qlora]'")
    if adapters.moves_base([*earlier, stage]):
        raise ValueError("lora.quantize: expected the LLM as it was loaded, but an earlier stage moves its weights")
    if run.parallel in ("fsdp2", "zero3"):
        raise ValueError(f"lora.quantize: {run.parallel} cannot shard quantized weights, expected ddp or zero2")


def _without_weights(run: RunConfig, part: Part) -> nn.Module:
    """A part of the run's model on the meta device: all its names, from configurations alone."""
    with torch.device("meta"), build.quiet_transformers():
        if part == "language":
            return build.language(run.llm, weights=False)
        tower = build.vision(run.encoder, weights=False)
        vision = VisionEncoder(tower, layer=run.encoder.layer, image_size=run.encoder.image_size)
        if part == "vision":
            return vision
        text = build.text_spec(build.language(run.llm, weights=False).config)
        return build.connector(run.connector.name, run.connector.options, vision=vision.spec, text=text)
