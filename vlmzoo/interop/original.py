"""Checkpoints as LLaVA's own code writes them: whole, a projector alone, or LoRA with what it trained beside."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmzoo import build
from vlmzoo.config import ConnectorConfig, EncoderConfig, LLMConfig
from vlmzoo.interop.adapter import SETTINGS, add_adapter
from vlmzoo.interop.weights import filled, read_weights
from vlmzoo.model import VisionLanguageModel

FAMILIES = {
    "LlavaLlamaForCausalLM": "LlamaForCausalLM",
    "LlavaMistralForCausalLM": "MistralForCausalLM",
    "LlavaQwenForCausalLM": "Qwen2ForCausalLM",
}
"""LLaVA's classes, and those of transformers that they extend."""

PROJECTORS = ("mm_projector.bin", "mm_projector.safetensors", "non_lora_trainables.bin")
NOT_THEIRS = re.compile(r"mm_|tune_mm|image_|use_mm|freeze_mm|tokenizer_|unfreeze_mm|vision_tower")
"""Keys of LLaVA's configuration that no language model of transformers has."""


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of LLaVA's own code."""
    return "mm_vision_tower" in config


def load_original(
    source: str, config: Mapping[str, Any], *, base: str | None, encoder: str | None, dtype: torch.dtype | None
) -> VisionLanguageModel:
    """The model of such a checkpoint. Pickled weights are read as tensors and nothing else.

    Args:
        base: the LLM of a projector or of LoRA, which hold none; a whole checkpoint has its own.
        encoder: None: the one that the checkpoint names.

    Raises:
        ValueError: weights missing, left over or misshapen, no base where one is needed, or an unknown projector.
    """
    folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(source))
    where = f"model {source}"
    dtype = dtype or torch.float32
    selected = config.get("mm_vision_select_feature", "patch")
    if selected != "patch":
        raise ValueError(f"{where}: mm_vision_select_feature is {selected!r}, expected 'patch'")
    parts = [file for name in PROJECTORS if (file := folder / name).is_file()]
    if parts:
        if base is None:
            raise ValueError(
                f"{where}: holds {parts[0].name} and no LLM: pass the one that it was trained on as `base`"
            )
        named = LLMConfig(name=base)
        language = build.language(named, dtype=dtype)
        weights = {name: value for file in parts for name, value in read_weights(file).items()}
    else:
        weights = {name: value for file in _shards(folder, where) for name, value in read_weights(file).items()}
        named = LLMConfig(name=base or source)
        language = _own_language(config, weights, where, dtype)
    projector, rest = _split(weights)
    if (folder / SETTINGS).is_file():
        add_adapter(folder, language, where)
    if parts:
        _fill(language, rest, where, partial=True)
    model = VisionLanguageModel.from_parts(
        EncoderConfig(name=encoder or config["mm_vision_tower"], layer=config.get("mm_vision_select_layer", -2)),
        _connector(config, where),
        language,
        image_token_id=build.image_token_id(build.tokenizer(named)),
        dtype=dtype,
    )
    _fill(model.connector, {f"inner.{_ours(name)}": value for name, value in projector.items()}, where)
    return model.eval()


def _connector(config: Mapping[str, Any], where: str) -> ConnectorConfig:
    kind = config.get("mm_projector_type", "linear")
    if kind == "linear":
        return ConnectorConfig("linear")
    if match := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        return ConnectorConfig("mlp", {"depth": int(match[1])})
    raise ValueError(f"{where}: mm_projector_type is {kind!r}, expected 'linear' or 'mlpNx_gelu'")


def _ours(name: str) -> str:
    """A projector's weight under our connector's name: 0.weight of an MLP, weight of a linear layer."""
    return f"layers.{name}" if name[0].isdigit() else f"project.{name}"


def _split(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The projector's weights, and the LLM's; a copy of the encoder is passed over, and what is computed."""
    projector, rest = {}, {}
    for name, value in weights.items():
        name = name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name
        if "mm_projector." in name:
            projector[name.partition("mm_projector.")[2]] = value
        elif "vision_tower." not in name and not name.endswith("rotary_emb.inv_freq"):
            rest[name] = value
    return projector, rest


def _shards(folder: Path, where: str) -> Iterator[Path]:
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            yield from files
            return
    raise ValueError(f"{where}: holds neither weights nor one of {', '.join(PROJECTORS)}")


def _own_language(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], where: str, dtype: torch.dtype
) -> PreTrainedModel:
    (name,) = config.get("architectures") or [None]
    if name not in FAMILIES:
        raise ValueError(f"{where}: architectures is [{name}], expected one of {', '.join(FAMILIES)}")
    kind: Any = getattr(transformers, FAMILIES[name])
    own = {key: value for key, value in config.items() if not NOT_THEIRS.match(key)}
    own = kind.config_class(**{key: value for key, value in own.items() if key not in ("model_type", "architectures")})
    try:
        return filled(kind, own, _split(weights)[1], dtype)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _fill(module: nn.Module, weights: Mapping[str, Tensor], where: str, *, partial: bool = False) -> None:
    """Copies weights into a module; with `partial` not all of its own need be there."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    missing = [] if partial else sorted(set(dict(module.named_parameters())) - set(weights))
    unknown = sorted(set(weights) - set(own))
    misshapen = sorted(name for name in set(weights) & set(own) if weights[name].shape != own[name].shape)
    for names, said in ((missing, "are missing"), (unknown, "have no place"), (misshapen, "do not fit")):
        if names:
            raise ValueError(f"{where}: {len(names)} weights {said}, {names[0]} first")
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
