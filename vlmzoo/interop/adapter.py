"""Adapters that peft wrote, added to the weights of an LLM."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from vlmzoo.interop.weights import read_weights

SETTINGS = "adapter_config.json"
UNLIKE = ("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "lora_bias")
"""Settings under which an update is not alpha / rank times a product."""


def add_adapter(folder: Path, language: nn.Module, where: str) -> None:
    """Adds low-rank updates to the weights that they belong to: W + alpha / r B A.

    Args:
        where: begins the message of what is raised.

    Raises:
        ValueError: no adapter there, one of another kind, weights that it replaces, or updates without a weight.

    Source: Hu et al., LoRA (2021), section 4.1.
    """
    try:
        adapter = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{where}: expected an adapter of peft, but {SETTINGS} is missing or broken") from None
    if (kind := adapter.get("peft_type", "LORA")) != "LORA":
        raise ValueError(f"{where}: {SETTINGS} has peft_type {kind!r}, expected 'LORA'")
    for name in UNLIKE:
        if adapter.get(name):
            raise ValueError(f"{where}: {SETTINGS} has {name} {adapter[name]!r}, expected none")
    safe, pickled = (folder / f"adapter_model.{end}" for end in ("safetensors", "bin"))
    file = pickled if pickled.is_file() and not safe.is_file() else safe
    weights = {name.removeprefix("base_model.model."): value for name, value in read_weights(file).items()}
    own = dict(language.named_parameters())
    scale = adapter["lora_alpha"] / adapter["r"]
    with torch.no_grad():
        for name, down in weights.items():
            target, found, _ = name.partition(".lora_A")
            if not found:
                if ".lora_B" not in name:
                    raise ValueError(f"{where}: {name} is no update, but a weight that takes another's place")
                continue
            up, weight = weights.get(name.replace(".lora_A", ".lora_B")), own.get(f"{target}.weight")
            if up is None or weight is None or weight.shape != (len(up), down.shape[1]):
                raise ValueError(f"{where}: the update of {target} has no weight that it fits")
            weight.copy_(weight.float() + scale * up.float() @ down.float())
