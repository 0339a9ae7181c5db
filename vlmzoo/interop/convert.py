"""transformers' image-text models as ours, and ours as theirs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from vlmzoo import build
from vlmzoo.connector import connectors
from vlmzoo.interop import (
    aria,
    blip,
    gemma,
    idefics,
    idefics3,
    internvl,
    janus,
    llava,
    llava_next,
    mistral3,
    mllama,
    original,
    ovis2,
    perception_lm,
    qwen,
)
from vlmzoo.interop.adapter import add_adapter
from vlmzoo.interop.architecture import Architecture, UnsupportedError
from vlmzoo.interop.weights import filled, refuse_faults, to_ours, to_theirs
from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel
from vlmzoo.registry import unknown

ARCHITECTURES: dict[str, Architecture] = {
    architecture.model: architecture
    for architecture in (
        aria.ARIA,
        llava.LLAVA,
        llava.VIP_LLAVA,
        llava_next.LLAVA_NEXT,
        llava_next.LLAVA_ONEVISION,
        blip.BLIP_2,
        blip.INSTRUCT_BLIP,
        gemma.GEMMA_3,
        gemma.PALIGEMMA,
        idefics.IDEFICS,
        idefics3.IDEFICS_2,
        idefics3.IDEFICS_3,
        idefics3.SMOLVLM,
        internvl.INTERNVL,
        janus.JANUS,
        mistral3.MISTRAL_3,
        ovis2.OVIS_2,
        perception_lm.PERCEPTION_LM,
        qwen.QWEN2_VL,
        qwen.QWEN2_5_VL,
        qwen.QWEN3_VL,
        mllama.MLLAMA,
    )
}
"""By the names of transformers' classes."""


class ImportedConfig(VisionLanguageConfig):
    """A configuration that remembers the class whose keywords its model takes."""

    model_type = "vlmzoo_imported"

    def __init__(self, source: str = "LlavaForConditionalGeneration", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.source = source


class ImportedModel(VisionLanguageModel):
    """A model of our parts that takes the keywords of the one that it came from."""

    config: ImportedConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = ImportedConfig

    def take_images(self, kwargs: dict[str, Any], pixel_values: Tensor | None, input_ids: Tensor) -> dict[str, Any]:
        kwargs["input_ids"] = input_ids
        if pixel_values is not None:
            kwargs["pixel_values"] = pixel_values
        ARCHITECTURES[self.config.source].translate(kwargs, self)
        del kwargs["input_ids"]
        return super().take_images(kwargs, kwargs.pop("pixel_values", None), input_ids)


def from_hf(model: PreTrainedModel) -> ImportedModel:
    """A model of transformers with our connector in it, and the same answers.

    Weights that both have are shared, not copied.

    Raises:
        ValueError: a class that is not known, or a setting of it that our connector does not have.
    """
    architecture = _architecture(type(model).__name__)
    try:
        values = architecture.config(model.config)
    except UnsupportedError as error:
        raise ValueError(f"{architecture.model}: {error}") from None
    output, words = model.get_output_embeddings(), model.get_input_embeddings()
    tied = output is not None and output.weight is words.weight and not architecture.unties
    build.load_connectors()
    given = {
        "vision_config": model.config.vision_config,
        "image_token_id": getattr(model.config, "image_token_id", None),
        **values,
        "text_config": _with_ties(values.get("text_config", model.config.get_text_config()), tied),
        "connector": architecture.connector,
        "connector_options": connectors.resolve(architecture.connector, values.get("connector_options", {})),
    }
    config = ImportedConfig(source=architecture.model, **given)
    try:
        renamed = to_ours(_weights(model), architecture.rules(model.config))
        imported = filled(ImportedModel, config, renamed, model.dtype)
    except ValueError as error:
        raise ValueError(f"{architecture.model}: {error}") from None
    imported.generation_config = copy.deepcopy(model.generation_config)
    return imported.train(model.training)


def to_hf(model: VisionLanguageModel) -> PreTrainedModel:
    """A stock model of transformers with the same weights, shared where they can be, and answers.

    Where `<image>` has an id beyond the LLM's vocabulary, that grows to hold it.

    Raises:
        ValueError: no class of transformers has these parts; the message says what each candidate lacks.
    """
    config = model.config
    candidates = [item for item in ARCHITECTURES.values() if item.connector == config.connector and item.back]
    reasons = []
    for architecture in candidates:
        try:
            return _exported(model, architecture)
        except UnsupportedError as error:
            reasons.append(f"{architecture.model}: {error}")
    if not candidates:
        known = sorted({item.connector for item in ARCHITECTURES.values() if item.back})
        reasons = [f"no class of transformers has it; those with one are {', '.join(known)}"]
    raise ValueError(f"connector {config.connector!r} cannot be exported: {'; '.join(reasons)}")


def _exported(model: VisionLanguageModel, architecture: Architecture) -> PreTrainedModel:
    """A model of this class with the weights of ours; raises `UnsupportedError`."""
    assert architecture.back is not None
    config, weights = model.config, _weights(model)
    values = dict(architecture.back(config))
    if "text_config" not in values:  # else the class has its own place for the image token
        vocab_size = max(config.text_config.vocab_size, config.image_token_id + 1)
        values["text_config"] = {**config.text_config.to_dict(), "vocab_size": vocab_size}
        words = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part}
        weights = {name: _grown(value, vocab_size) if id(value) in words else value for name, value in weights.items()}
    given = {
        "vision_config": config.vision_config.to_dict(),
        "image_token_id": config.image_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
        **values,
    }
    kind: Any = getattr(transformers, architecture.model)
    theirs = kind.config_class(**{key: value for key, value in given.items() if value is not None})
    exported = filled(kind, theirs, to_theirs(weights, architecture.rules(theirs)), model.dtype)
    exported.generation_config = copy.deepcopy(model.generation_config)
    return exported.train(model.training)


def load(
    path: str | Path,
    *,
    base: str | None = None,
    encoder: str | None = None,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> VisionLanguageModel:
    """A model from a checkpoint, ours, transformers' or LLaVA's own, by directory or hub id.

    Weights come from safetensors; those that LLaVA's own code pickled are read as tensors and nothing else.

    Args:
        base, encoder: names of the LLM and the encoder for those of LLaVA's own checkpoints that hold none.
        adapter: a folder with low-rank adapters of the LLM, as peft writes them, to merge into it.
        dtype: None: the checkpoint's own.

    Raises:
        ValueError: nothing there, an architecture that is not known, a configuration without one of its parts,
            weights missing, left over or misshapen, or an adapter of another LLM or kind.
    """
    model = _loaded(str(path), base, encoder, dtype)
    if adapter is not None:
        add_adapter(Path(adapter), model.language, f"adapter {adapter}")
    return model


def _loaded(source: str, base: str | None, encoder: str | None, dtype: torch.dtype | None) -> VisionLanguageModel:
    values, _ = build.read(PreTrainedConfig.get_config_dict, source, "model")
    if original.is_original(values):
        return original.load_original(source, values, base=base, encoder=encoder, dtype=dtype)
    config = build.read(AutoConfig.from_pretrained, source, "model")
    if isinstance(config, VisionLanguageConfig):
        kind: Any = ImportedModel if isinstance(config, ImportedConfig) else VisionLanguageModel
        model, found = _pretrained(kind, source, dtype)
    else:
        named = list(getattr(config, "architectures", None) or [])
        needs = _architecture(named[0] if named else config.model_type).needs
        if missing := [name for name in needs if name not in values]:
            raise ValueError(f"model {source}: config.json has no {missing[0]}")
        model, found = _pretrained(AutoModelForImageTextToText, source, dtype)
    refuse_faults(found, f"model {source}: ")
    return model if isinstance(model, VisionLanguageModel) else from_hf(model)


def beside(path: str | Path, *, base: str | None = None, encoder: str | None = None) -> tuple[str, str]:
    """Names of what holds the tokenizer, and of what holds the image processor, of a checkpoint that `load` reads."""
    source = str(path)
    values, _ = build.read(PreTrainedConfig.get_config_dict, source, "model")
    if original.is_original(values):
        return base or source, encoder or values["mm_vision_tower"]
    return source, source


def _architecture(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise unknown("model class", name, ARCHITECTURES)
    return ARCHITECTURES[name]


def _pretrained(kind: Any, source: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with build.quiet_transformers():
        return build.read(kind.from_pretrained, source, "model", dtype=dtype or "auto", **options)


def _with_ties(config: Any, tied: bool) -> Any:
    config = copy.deepcopy(config)
    config.tie_word_embeddings = tied
    return config


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that are saved."""
    kept = set(model.state_dict())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return dict(model.named_parameters()) | buffers


def _grown(rows: Tensor, count: int) -> Tensor:
    """Words (count, dim), new ones the mean of the others: such a word's logit is never the largest."""
    return torch.cat([rows, rows.mean(0, keepdim=True).expand(count - len(rows), -1)]).detach()


AutoConfig.register("vlmzoo_imported", ImportedConfig)
AutoModelForImageTextToText.register(ImportedConfig, ImportedModel)
